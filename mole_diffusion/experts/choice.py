"""What a thread (or task) chose, and the forward passes it is in: nobody else sees them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .run import Run, Weigher


@dataclass(frozen=True, eq=False)
class Choice:
    """What ``using`` set: it belongs to the thread (or task) that is inside of the ``with`` and to nobody else."""

    keep: Tensor
    scale: Tensor
    silent: bool
    weigher: Weigher | None = None
    call: Any = None
    kept: tuple[int, ...] | None = None
    """Indices of the LoRAs that any row keeps; ``None`` where all are."""
    moved: dict[torch.device | None, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device | None) -> tuple[Tensor, Tensor]:
        """`keep` and `scale` there; the same tensors every time, so that a weigher can tell that nothing changed."""
        if device not in self.moved:
            self.moved[device] = self.keep.to(device), self.scale.to(device)
        return self.moved[device]


class Passes(threading.local):
    """The forward passes of one thread, by component."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.running: set[str] = set()
        self.resumed: dict[str, Run] = {}
        self.alone: dict[str, tuple[tuple[Any, ...], Run]] = {}


# By experts; replaced as a whole and never changed, so that a context keeps what it was given.
CHOICES: ContextVar[Mapping[int, Choice]] = ContextVar("mole_diffusion.experts.choices", default={})  # noqa: B039
