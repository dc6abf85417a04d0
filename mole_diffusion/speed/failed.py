"""A side that could not be measured, so that the others still are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Failed:
    """What stands in a table in place of numbers.

    Attributes:
        side: Its name.
        loras: How many are loaded.
        error: What was raised, in one line.
    """

    side: str
    loras: int
    error: str

    @classmethod
    def of(cls, side: str, loras: int, error: Exception) -> Failed:
        lines = str(error).strip().splitlines()
        return cls(side, loras, f"{type(error).__name__}: {lines[0] if lines else ''}"[:300])
