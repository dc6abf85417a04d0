"""Arithmetic that autocast leaves alone: weights of LoRAs stay as precise as they are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def is_cast(device: torch.device) -> bool:
    """Whether products on a device are rounded by autocast now."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def uncast(device: torch.device) -> AbstractContextManager[None]:
    """A `with` block on a device in which autocast is off; nothing at all where it was off before."""
    return torch.autocast(device.type, enabled=False) if is_cast(device) else nullcontext()
