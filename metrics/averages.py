"""Means that come out the same, to the last digit, in whatever order and in however many processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

_UNIT = 2.0**40


class Averages(Metric):
    """Means of several numbers over all that was measured.

    Sums are integers, in units of 2^-40: floating-point sums would depend on the order of the pictures, and on how
    many processes share them. No device or precision loses them.

    Args:
        names: Of the numbers.
    """

    is_differentiable = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.add_state("total", torch.zeros(len(names), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(names), dtype=torch.int64), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Counts rows of `(rows, len(names))`; NaN is a number that this row does not have."""
        rows = values.detach().to("cpu", torch.float64)
        there = ~rows.isnan()
        units = (rows.nan_to_num() * _UNIT).round().to(torch.int64)
        self.total += units.sum(dim=0).to(self.total.device)
        self.count += there.sum(dim=0).to(self.count.device)

    def means(self) -> dict[str, float]:
        """Mean by name; names that were never counted are left out.

        Raises:
            ValueError: Nothing was counted at all.
        """
        total, count = self.total.tolist(), self.count.tolist()
        if not any(count):
            raise ValueError(f"{type(self).__name__} has measured nothing yet. Call `update` first.")
        return {name: t / _UNIT / c for name, t, c in zip(self.names, total, count, strict=True) if c}

    def compute(self) -> dict[str, float]:
        return self.means()
