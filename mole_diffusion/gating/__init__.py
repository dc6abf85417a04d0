"""Gates: which LoRA gets how much in which place, learned (equations 9-15 of the paper)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mole_diffusion.lazily import on_first_use

if TYPE_CHECKING:
    from .balance import balance_loss, floor_loss, mean_usage
    from .config import GateConfig
    from .gate import Gate, masked_softmax
    from .model import MoLEModel
    from .record import GateRecord, GateTable
    from .spec import Entry, GateSpec
else:
    __getattr__, __dir__ = on_first_use(__name__)

__all__ = [
    "Entry",
    "Gate",
    "GateConfig",
    "GateRecord",
    "GateSpec",
    "GateTable",
    "MoLEModel",
    "balance_loss",
    "floor_loss",
    "masked_softmax",
    "mean_usage",
]
