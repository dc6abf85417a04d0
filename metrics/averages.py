"""Means that do not depend on the order, nor on how many processes share the work."""

from __future__ import annotations

import copy
import inspect
import secrets
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.wrappers import BootStrapper
from torchmetrics.wrappers.abstract import WrapperMetric

from ..errors import MoLEError

_UNIT = 2.0**40
_CALLS_BETWEEN = 8  # of a wrapper's `update` and the metric's, with torchmetrics' own around each


class Averages(Metric):
    """Means of several numbers over all that was measured.

    Sums are integers, in units of 2^-40: floating-point sums would depend on the order of the pictures, and on how
    many processes share them. No device or precision loses them. So the same numbers give the same means to the last
    digit. A picture's own number may differ in its last digits with the pictures that it was embedded beside.

    Args:
        names: Names of the numbers.
        kwargs: What every `torchmetrics.Metric` takes: `dist_sync_on_step`, `sync_on_compute` ...
    """

    is_differentiable = False
    full_state_update = False

    total: Tensor
    count: Tensor
    which: Tensor

    def __init__(self, names: list[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = list(names)
        self._chosen: torch.dtype | None = None
        self.add_state("total", torch.zeros(len(names), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(names), dtype=torch.int64), dist_reduce_fx="sum")
        # A collection takes metrics of equal states for one, and goes on with the first alone: two detectors that agree
        # on a first picture are still two.
        self.add_state("which", torch.tensor([secrets.randbits(62)]), dist_reduce_fx="max")

    def add(self, values: Tensor) -> None:
        """Counts rows of `(rows, len(names))`; NaN is a number that this row does not have.

        Raises:
            MoLEError: A number is infinite.
        """
        rows = values.detach().to("cpu", torch.float64)
        if rows.isinf().any():
            raise MoLEError(f"{type(self).__name__} got a number that is infinite. Measure in float32.")
        there = ~rows.isnan()
        units = (rows.nan_to_num() * _UNIT).round().to(torch.int64)
        self.total += units.sum(dim=0).to(self.total.device)
        self.count += there.sum(dim=0).to(self.count.device)

    def means(self) -> dict[str, float]:
        """Mean by name; names that were never counted are left out.

        Raises:
            MoLEError: Nothing was counted at all.
        """
        total, count = self.total.tolist(), self.count.tolist()
        if not any(count):
            raise MoLEError(f"{type(self).__name__} has measured nothing yet. Call `update` first.")
        return {name: t / _UNIT / c for name, t, c in zip(self.names, total, count, strict=True) if c}

    def result(self) -> dict[str, float]:
        """What `compute` hands out as tensors."""
        return self.means()

    def compute(self) -> dict[str, Tensor]:
        """Each number by its name, a tensor without dimensions."""
        # In double precision, as the sums are, unless the device has none or the user chose another type.
        dtype = self._chosen or (torch.float32 if self.device.type == "mps" else torch.float64)
        return {name: torch.tensor(value, dtype=dtype, device=self.device) for name, value in self.result().items()}

    def only(self, name: str | None = None) -> OneNumber:
        """This metric with one of its numbers as its result, for wrappers such as `MinMaxMetric` that take no dict.

        Args:
            name: Name of the number; `None` where there is one only.
        """
        return OneNumber(self, name)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draws results, as every metric of torchmetrics does.

        Args:
            val: One result or several; `None` for the present one.
            ax: The axes to draw into; `None` for a new figure.
        """
        return self._plot(val, ax)

    def set_dtype(self, dst_type: str | torch.dtype) -> Averages:
        """The type of the results. Sums stay integers: half precision would make them infinite."""
        kind = getattr(torch, dst_type.removeprefix("torch."), None) if isinstance(dst_type, str) else dst_type
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise MoLEError(f"results are of a floating-point type such as torch.half, got {dst_type!r}.")
        self._dtype = self._chosen = kind
        self._computed = None
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Averages:
        # `BootStrapper` copies a metric many times; encoders are frozen, and one serves all of them.
        memo.update({id(encoder): encoder for encoder in self.children()})
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied


def refuse_drawn_again(metric: Averages) -> None:
    """Raises MoLEError in an `update` that torchmetrics' `BootStrapper` calls.

    It draws rows of tensors again and leaves lists as they are: pictures would be measured by texts of other ones.
    """
    frame = inspect.currentframe()
    for _ in range(_CALLS_BETWEEN):
        frame = None if frame is None else frame.f_back
        if frame is not None and frame.f_globals.get("__name__") == BootStrapper.__module__:
            name = type(metric).__name__
            raise MoLEError(
                f"BootStrapper draws pictures again and not the texts that belong to them, so {name} would compare "
                f"pictures with texts of others. `{name}.measure` gives each picture's numbers: draw from these."
            )


class OneNumber(WrapperMetric):
    """One of the numbers of a metric, as a tensor without dimensions.

    Args:
        metric: A metric that gives several numbers.
        name: Name of the number; `None` where it gives one only.
    """

    full_state_update = False

    def __init__(self, metric: Averages, name: str | None = None) -> None:
        super().__init__()
        self.metric, self.name = metric, name
        # `Running` keeps the states of what it wraps: these are the metric's own.
        self._defaults, self._reductions, self._persistent = metric._defaults, metric._reductions, metric._persistent

    @property
    def which(self) -> Tensor:
        """The metric's number."""
        return self.metric.which

    @which.setter
    def which(self, value: Tensor) -> None:
        self.metric.which = value

    @property
    def total(self) -> Tensor:
        """The metric's sums."""
        return self.metric.total

    @total.setter
    def total(self, value: Tensor) -> None:
        self.metric.total = value

    @property
    def count(self) -> Tensor:
        """How many the metric has counted."""
        return self.metric.count

    @count.setter
    def count(self, value: Tensor) -> None:
        self.metric.count = value

    def _filter_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        """What a collection hands on of the keywords that it is given for all its metrics."""
        return self.metric._filter_kwargs(**kwargs)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As the metric's."""
        self.metric.update(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the metric's, one number of it."""
        return self._pick(self.metric(*args, **kwargs))

    def compute(self) -> Tensor:
        """The number.

        Raises:
            MoLEError: The metric does not give it.
        """
        self.metric._update_count = max(self.metric._update_count, self._update_count)  # `Running` counts here
        return self._pick(self.metric.compute())

    def reset(self) -> None:
        """As the metric's."""
        super().reset()
        self.metric.reset()

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """As `Averages.plot`."""
        return self._plot(val, ax)

    def _pick(self, numbers: dict[str, Tensor]) -> Tensor:
        if self.name is None and len(numbers) == 1:
            return next(iter(numbers.values()))
        if self.name not in numbers:
            raise MoLEError(f"there is no number {self.name!r}; there are {', '.join(numbers)}.")
        return numbers[self.name]
