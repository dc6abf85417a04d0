"""What stands in tables: one side's times over another's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ratio:
    """A side over another, one quotient for each round: their median and quartiles."""

    low: float
    middle: float
    high: float

    @classmethod
    def between(cls, side: list[float], other: list[float]) -> Ratio:
        quotients = np.array(side) / np.array(other)
        return cls(*(float(x) for x in np.quantile(quotients, [0.25, 0.5, 0.75])))
