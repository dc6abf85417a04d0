"""Arithmetic that autocast leaves alone: weights of LoRAs stay as precise as they are."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch

_available = functools.cache(torch.amp.is_autocast_available)
_NOTHING = nullcontext()


def is_cast(kind: str) -> bool:
    """Whether products on devices of a kind, such as `"cuda"`, are rounded by autocast now."""
    return _available(kind) and torch.is_autocast_enabled(kind)


def uncast(kind: str) -> AbstractContextManager[None]:
    """A `with` block in which autocast is off on devices of a kind; nothing at all where it was off before."""
    return torch.autocast(kind, enabled=False) if is_cast(kind) else _NOTHING
