"""What stands in tables: one side's times over another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_QUARTILES = [0.25, 0.5, 0.75]


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
    def inside(cls, parts: Sequence[Mapping[str, float]], other: list[float]) -> Ratio:
        """What parts of a side take over another's median: quartiles of each part over all rounds, added up.

        Args:
            parts: Seconds by the name of each part, one for each round.
            other: Seconds of the other side.
        """
        of_each = [[of_round.get(name, 0.0) for name in parts[0]] for of_round in parts]
        found = np.quantile(of_each, _QUARTILES, axis=0).sum(axis=1) / np.median(other)
        return cls(*(float(x) for x in found))

    @classmethod
    def _of(cls, quotients: NDArray[np.float64]) -> Ratio:
        return cls(*(float(x) for x in np.quantile(quotients, _QUARTILES)))
