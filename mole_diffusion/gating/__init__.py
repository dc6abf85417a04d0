"""Gates: which LoRA gets how much in which place, learned (equations 9-15 of the paper)."""

from __future__ import annotations

from .balance import balance_loss, floor_loss, mean_usage
from .config import GateConfig
from .gate import Gate, masked_softmax
from .model import MoLEModel
from .record import GateRecord, GateTable
from .spec import Entry, GateSpec

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
