"""Rows of a benchmark by method, by LoRAs and by picture, as tables and plots need them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mole_diffusion.benchmark.config import BenchmarkConfig
from mole_diffusion.benchmark.measures import SHOWN, Measure
from mole_diffusion.benchmark.row import Row


def measured(rows: Sequence[Row]) -> list[Measure]:
    """The measures of the tables, as far as rows have them."""
    return [measure for measure in SHOWN if any(measure.key in row.numbers for row in rows)]


def of_method(rows: Sequence[Row], label: str) -> list[Row]:
    """The rows of one method."""
    return [row for row in rows if row.method == label]


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the numbers that are not None; None where there is none."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def mean_of(rows: Sequence[Row], measure: Measure) -> float | None:
    """Mean of a measure over the rows that have it; None without any."""
    return mean(row.numbers.get(measure.key) for row in rows)


def by_picture(rows: Sequence[Row], label: str, measure: Measure) -> dict[tuple[str, str, int, int], float]:
    """One method's number for each picture that it has in common with the others, which a comparison pairs."""
    return {row.picture: row.numbers[measure.key] for row in of_method(rows, label) if measure.key in row.numbers}


def means_by_loras(config: BenchmarkConfig, rows: Sequence[Row], measure: Measure) -> dict[str, dict[str, float]]:
    """`Row.loras` to label of a method to mean."""
    means: dict[str, dict[str, float]] = {}
    for loras in dict.fromkeys(row.loras for row in rows):
        mine = [row for row in rows if row.loras == loras]
        for label in config.labels:
            value = mean_of(of_method(mine, label), measure)
            if value is not None:
                means.setdefault(loras, {})[label] = value
    return means
