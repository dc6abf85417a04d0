"""What a forward pass has to do, counted and not timed: products, operations, bytes."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {
    "mm": (0, 1),
    "addmm": (1, 2),
    "addmm_": (1, 2),
    "bmm": (0, 1),
    "baddbmm": (1, 2),
    "baddbmm_": (1, 2),
    "convolution": (0, 1),
}


class Counted(TorchDispatchMode):
    """Counts what torch does inside a `with`, the same on every machine.

    Attributes:
        products: `(shape, shape)` of the two tensors of every matrix product and convolution, to how often.
        operators: How many operators ran at all, views among them: what Python and a GPU's queue have to do.
        operations: Multiplications and additions of all products, attention's and those of backward passes included.
        bytes: What all operations read and write, views aside: each input once, each output once.
        largest: Elements of the largest tensor that was made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
        self.operators = 0
        self.operations = 0
        self.bytes = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        name = func.overloadpacket.__name__
        made = [part for part in _flat(result) if isinstance(part, Tensor)]
        if name in _PRODUCTS:
            left, right = (tuple(args[index].shape) for index in _PRODUCTS[name])
            self.products[left, right] += 1
            outputs = made[0].numel()
            inner = math.prod(right[1:]) if name == "convolution" else left[-1]
            self.operations += 2 * outputs * inner
        elif name == "convolution_backward":
            gradient, _, weight = args[:3]
            asked = sum(args[-1][:2])  # the gradients of its input and of its weight
            self.operations += asked * 2 * gradient.numel() * math.prod(weight.shape[1:])
        elif "scaled_dot_product" in name:
            backward = "backward" in name
            query, key, value = args[1:4] if backward else args[:3]
            scores = 2 * query.numel() * key.shape[-2]
            values = 2 * query.shape[:-1].numel() * value.shape[-2:].numel()
            # Backward: the scores again, the gradients of queries and keys; those of probabilities and values.
            self.operations += 3 * scores + 2 * values if backward else scores + values
        if not func.is_view:
            read = [part for part in _flat([*args, *(kwargs or {}).values()]) if isinstance(part, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in [*read, *made])
            self.largest = max([self.largest, *(tensor.numel() for tensor in made)])
        return result

    @property
    def count(self) -> int:
        """How many products."""
        return sum(self.products.values())


def _flat(value: Any) -> list[Any]:
    leaves: list[Any] = torch.utils._pytree.tree_leaves(value)
    return leaves


def python_calls(action: Callable[[], Any], within: str = "") -> int:
    """How many functions run in Python.

    Args:
        action: What runs them.
        within: Only those in files below this folder are counted; by default all are.
    """
    count, before = 0, sys.getprofile()

    def seen(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(within)

    sys.setprofile(seen)
    try:
        action()
    finally:
        sys.setprofile(before)
    return count
