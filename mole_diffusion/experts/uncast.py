"""Arithmetic that autocast leaves alone: weights of LoRAs stay as precise as they are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def uncast(device: torch.device) -> AbstractContextManager[None]:
    """A `with` block on a device in which autocast is off; nothing at all where it was off before."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
