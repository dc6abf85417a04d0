"""The history of a gate training: numbers of each step, and the mean gates early and late."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.gating import GateTable


class History:
    """Numbers of every step, and mean gates over the first and the last tenth of the steps.

    Args:
        steps: How many the training has.

    Attributes:
        numbers: Name to one number per step: "loss", each term, "entropy", "temperature", "weight/<lora>" ...
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.numbers: dict[str, list[float]] = {}
        self._sums: dict[str, list[list[float]]] = {}
        self._counts: dict[str, int] = {}
        self._labels: dict[str, list[str]] = {}

    def add(self, step: int, numbers: Mapping[str, float], table: GateTable) -> None:
        """Notes step `step` (from 1)."""
        for name, value in numbers.items():
            self.numbers.setdefault(name, []).append(value)
        self._labels = {"places": list(table.places), "loras": list(table.loras)}
        tenth = max(1, self.steps // 10)
        for when, now in (("early", step <= tenth), ("late", step > self.steps - tenth)):
            if now:
                values = table.values.double()
                before = self._sums.get(when)
                self._sums[when] = (values if before is None else torch.tensor(before).double() + values).tolist()
                self._counts[when] = self._counts.get(when, 0) + 1

    def tables(self) -> dict[str, GateTable]:
        """Mean gates of the first tenth ("early") and of the last ("late"), as far as these were reached."""
        places, loras = tuple(self._labels.get("places", ())), tuple(self._labels.get("loras", ()))
        return {
            when: GateTable(places, loras, torch.tensor(total).double() / self._counts[when])
            for when, total in self._sums.items()
        }

    def first_mean(self, name: str) -> float:
        """Mean of a number over the first tenth of the steps."""
        values = self.numbers[name][: max(1, self.steps // 10)]
        return sum(values) / len(values)

    def last_mean(self, name: str) -> float:
        """Mean of a number over the last tenth of the steps."""
        values = self.numbers[name][-max(1, self.steps // 10) :]
        return sum(values) / len(values)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"numbers": self.numbers, "sums": self._sums, "counts": self._counts, "labels": self._labels}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where a checkpoint was written."""
        self.numbers, self._sums = state["numbers"], state["sums"]
        self._counts, self._labels = state["counts"], state["labels"]


def gate_entropy(shares: Tensor, present: Tensor) -> Tensor:
    """Mean entropy of the gates in nats, over the batch and the places that at least two LoRAs touch.

    Log N where all gates are equal, 0 where each place has one LoRA only: Figure 5 of the paper.

    Args:
        shares: (batch, places, N), rows summing to one.
        present: (places, N) bool.
    """
    entropy = -(shares * shares.clamp_min(torch.finfo(shares.dtype).tiny).log()).sum(-1)  # (batch, places)
    contested = present.to(shares.device).sum(-1) > 1
    return entropy[:, contested].mean() if contested.any() else entropy.new_zeros(())
