"""What a thread (or task) chose: nobody else sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .blocks import Blocks
from .run import Weigher


@dataclass(frozen=True, eq=False)
class Choice:
    """What `using` set: it belongs to the thread (or task) that is inside of the `with` and to nobody else.

    Attributes:
        keep: `(rows | 1, N)` of 0 and 1.
        scale: `(rows | 1, N)`.
        weigher: Who weighs; `None` leaves it to who weighs elsewhere.
        call: The call of a pipeline it is for.
        kept: Indices of the LoRAs that any row keeps, none where every weight is zero; `None` where all are.
    """

    keep: Tensor
    scale: Tensor
    weigher: Weigher | None = None
    call: Any = None
    kept: tuple[int, ...] | None = None
    _moved: dict[torch.device | None, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device | None) -> tuple[Tensor, Tensor]:
        """`keep` and `scale` there; the same tensors every time, so that a weigher can tell that nothing changed."""
        if device not in self._moved:
            self._moved[device] = self.keep.to(device), self.scale.to(device)
        return self._moved[device]


# Each of who holds the LoRAs that it is about.
CHOICES: Blocks[Choice] = Blocks("mole_diffusion.experts.choices")
