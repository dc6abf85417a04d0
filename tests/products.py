"""Counting the products a model takes, by their shapes: what a fast path leaves out shows without a clock."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.addmm_.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
    aten.baddbmm_.default: (1, 2),
    aten.convolution.default: (0, 1),
}


class Products(TorchDispatchMode):
    """Inside a ``with``: every product of two tensors.

    Attributes:
        shapes: ``(left, right)`` shapes to how often.
        largest: Number of elements of the largest tensor that was made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            left, right = (tuple(args[index].shape) for index in PRODUCTS[func])
            self.shapes[left, right] += 1
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result

    @property
    def count(self) -> int:
        return sum(self.shapes.values())

    def beyond(self, other: Products) -> dict[tuple[tuple[int, ...], tuple[int, ...]], int]:
        """Those that the other has not."""
        return dict(self.shapes - other.shapes)


def rows_of(products: dict[tuple[tuple[int, ...], tuple[int, ...]], int]) -> int:
    """Smallest side of each product, summed: with low-rank factors beside large modules, the ranks."""
    return sum(min(*left[-2:], *right) * count for (left, right), count in products.items())
