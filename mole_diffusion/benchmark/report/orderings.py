"""Which of the paper's orderings of two numbers hold here, and how surely."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from mole_diffusion.benchmark.config import BenchmarkConfig
from mole_diffusion.benchmark.measures import IMAGE, TEXT
from mole_diffusion.benchmark.report.groups import by_picture, mean_of, means_by_loras, of_method
from mole_diffusion.benchmark.report.paper_table import PaperRow, PaperTable
from mole_diffusion.benchmark.report.tables import interval
from mole_diffusion.benchmark.row import Row
from mole_diffusion.benchmark.stats import paired_bootstrap

COLUMNS = {"text": TEXT, "image": IMAGE}


class Ordering(NamedTuple):
    """Whether an ordering of two of the paper's numbers holds here.

    Attributes:
        holds: It does, going by the means.
        sure: The interval of the difference leaves 0 out.
        sentence: The whole of it in words.
    """

    holds: bool
    sure: bool
    sentence: str


def rows_beside(rows: Sequence[Row], row: PaperRow) -> list[Row]:
    """Our rows that a row of the paper stands beside."""
    return [r for r in of_method(rows, str(row.ours)) if row.loras in (None, r.num_kept)]


def between_methods(config: BenchmarkConfig, table: PaperTable, rows: Sequence[Row]) -> list[Ordering]:
    """Two methods, with the same number of LoRAs."""
    orderings = []
    for pair in combinations([row for row in table.rows if rows_beside(rows, row)], 2):
        if pair[0].loras != pair[1].loras:
            continue
        for column, measure in COLUMNS.items():
            worse, better = sorted(pair, key=lambda row: row.mean(column))
            if worse.mean(column) == better.mean(column):
                continue
            mine = [*rows_beside(rows, better), *rows_beside(rows, worse)]
            ours, theirs = (by_picture(mine, str(row.ours), measure) for row in (better, worse))
            if not ours.keys() & theirs.keys():
                continue
            difference = paired_bootstrap(ours, theirs)
            where = "" if worse.loras is None else f" with {worse.loras} LoRAs"
            holds, sure = difference[0] > 0, difference[1] > 0 or difference[2] < 0
            sentence = (
                f"{measure.heading}{where}, {better.method} over {worse.method} ({better.mean(column):.3f} over "
                f"{worse.mean(column):.3f} in the paper): {'holds' if holds else 'does not hold'}"
                f"{'' if sure else ', but the interval has 0 inside'}; {better.ours} − {worse.ours} is "
                f"{interval(difference)}.{_in_how_many(config, mine, better, worse, column)}"
            )
            orderings.append(Ordering(holds, sure, sentence))
    return orderings


def _in_how_many(config: BenchmarkConfig, rows: Sequence[Row], better: PaperRow, worse: PaperRow, column: str) -> str:
    """In how many compositions the better one is better, where the paper prints them."""
    theirs = list(zip(getattr(better, column), getattr(worse, column), strict=True))
    if len(theirs) == 1:
        return ""
    means = [m for m in means_by_loras(config, rows, COLUMNS[column]).values() if {better.ours, worse.ours} <= m.keys()]
    here = sum(m[str(better.ours)] > m[str(worse.ours)] for m in means)
    there = sum(a > b for a, b in theirs)
    return f" In the paper that is so in {there} of {len(theirs)} compositions, here in {here} of {len(means)}."


def between_counts(table: PaperTable, rows: Sequence[Row]) -> list[Ordering]:
    """One method, with the fewest and with the most LoRAs: other compositions, so nothing can be paired."""
    orderings = []
    there = [row for row in table.rows if row.loras is not None and rows_beside(rows, row)]
    for method in dict.fromkeys(row.method for row in there):
        mine = sorted((row for row in there if row.method == method), key=lambda row: row.loras or 0)
        few, many = mine[0], mine[-1]
        for column, measure in COLUMNS.items():
            before, after = (mean_of(rows_beside(rows, row), measure) for row in (few, many))
            if before is None or after is None or few.mean(column) == many.mean(column):
                continue
            rises = many.mean(column) > few.mean(column)
            holds = (after > before) == rises
            sentence = (
                f"{measure.heading}, {method} from {few.loras} to {many.loras} LoRAs {'rises' if rises else 'falls'} "
                f"({few.mean(column):.3f} to {many.mean(column):.3f} in the paper): "
                f"{'holds' if holds else 'does not hold'}; {before:.3f} to {after:.3f} here, without an interval, "
                "since the compositions are others."
            )
            orderings.append(Ordering(holds, False, sentence))
    return orderings
