"""Arithmetic that autocast leaves alone: weights of LoRAs stay as precise as they are."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch


def is_cast(device: torch.device) -> bool:
    """Whether products on a device are rounded by autocast now."""
    kind = device.type
    return _may_be(kind) and torch.is_autocast_enabled(kind)


@functools.cache  # asked at every module
def _may_be(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def uncast(device: torch.device) -> AbstractContextManager[None]:
    """A `with` block on a device in which autocast is off; nothing at all where it was off before."""
    return torch.autocast(device.type, enabled=False) if is_cast(device) else nullcontext()
