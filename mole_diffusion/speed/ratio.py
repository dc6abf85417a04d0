"""What stands in tables: one side's times over another's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ratio:
    """A side over another, one quotient for each round: their median and quartiles."""

    low: float
    middle: float
    high: float

    @classmethod
    def between(cls, side: list[float], other: list[float]) -> Ratio:
        return cls._of(np.array(side) / np.array(other))

    @classmethod
    def above(cls, side: list[float], less: list[float], other: list[float]) -> Ratio:
        """What a side takes more than one that takes less, over a third."""
        return cls._of((np.array(side) - np.array(less)) / np.array(other))

    @classmethod
    def _of(cls, quotients: NDArray[np.float64]) -> Ratio:
        return cls(*(float(x) for x in np.quantile(quotients, [0.25, 0.5, 0.75])))
