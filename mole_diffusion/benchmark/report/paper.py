"""A table of the paper beside our own, by its orderings: digits of another base, CLIP and concepts do not compare."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

from mole_diffusion.benchmark.config import BenchmarkConfig
from mole_diffusion.benchmark.measures import IMAGE, TEXT
from mole_diffusion.benchmark.report.groups import by_picture, mean_of, means_by_loras, of_method
from mole_diffusion.benchmark.report.tables import interval
from mole_diffusion.benchmark.row import Row
from mole_diffusion.benchmark.stats import paired_bootstrap
from mole_diffusion.errors import MoLEError
from mole_diffusion.tables import markdown_table, number
from mole_diffusion.yaml_files import read_yaml

COLUMNS = {"text": TEXT, "image": IMAGE}


@dataclass(frozen=True)
class PaperRow:
    """One method of the paper.

    Attributes:
        method: The paper's name.
        ours: Label of the method that is the same here; `None`: there is none.
        loras: Number of LoRAs, where a table has several.
        text: Text alignment, of each composition or as one mean.
        image: Image alignment, mean over concepts; likewise.
    """

    method: str
    ours: str | None
    loras: int | None
    text: tuple[float, ...]
    image: tuple[float, ...]

    def mean(self, column: str) -> float:
        """To four digits, more than any table prints, so that equal numbers are equal."""
        values: tuple[float, ...] = getattr(self, column)
        return round(sum(values) / len(values), 4)


@dataclass(frozen=True)
class PaperTable:
    """A table with where it comes from and what to know about it."""

    title: str
    note: str
    rows: tuple[PaperRow, ...]


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


def read_paper(path: str | os.PathLike[str]) -> PaperTable:
    """Reads a YAML file of `title`, `note` and `rows`, a mapping of `PaperRow` each.

    Raises:
        MoLEError: It is no such file.
    """
    try:
        given = read_yaml(path)
        rows = tuple(_row(row) for row in given["rows"])
        return PaperTable(str(given["title"]), str(given["note"]), rows)
    except (KeyError, TypeError, ValueError) as error:
        raise MoLEError(
            f"{os.fspath(path)} is no table of a paper: {error!r}. It must have title, note and rows of method, text "
            "and image, with ours and loras where they apply."
        ) from None


def _row(given: Any) -> PaperRow:
    text, image = (
        tuple(float(value) for value in (given[key] if isinstance(given[key], list) else [given[key]]))
        for key in ("text", "image")
    )
    if not text or len(text) != len(image):
        raise MoLEError(f"{given['method']} has {len(text)} numbers for text and {len(image)} for image")
    return PaperRow(str(given["method"]), given.get("ours"), given.get("loras"), text, image)


def paper_section(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    """The paper's table beside ours, and of every ordering of two of its numbers whether it holds here."""
    if config.paper is None:
        return ""
    table, whole = read_paper(config.paper), [row for row in rows if row.is_whole]
    lines = []
    for row in table.rows:
        mine = _mine(whole, row) if row.ours in config.labels else []
        ours = [number(mean_of(mine, measure)) for measure in COLUMNS.values()]
        count = [] if row.loras is None else [str(row.loras)]
        theirs = [number(row.mean(column)) for column in COLUMNS]
        lines.append([*count, row.method, *theirs, str(row.ours) if mine else "–", *ours])
    header = [*(["LoRAs"] if table.rows[0].loras is not None else []), "in the paper", "text", "image"]
    orderings = [*_between_methods(config, table, whole), *_between_counts(table, whole)]
    held = [one.sure for one in orderings if one.holds]
    parts = [
        "## Beside the paper\n",
        f"{table.title}. {table.note} Orderings can be compared, digits cannot: base, CLIP and concepts are others.\n",
        markdown_table([*header, "here", TEXT.heading, IMAGE.heading], lines),
        f"{len(held)} of {len(orderings)} orderings hold, {sum(held)} of these with an interval that leaves out 0.\n"
        if orderings
        else "",
        "\n".join(f"- {one.sentence}" for one in orderings),
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _mine(rows: Sequence[Row], row: PaperRow) -> list[Row]:
    """Our rows that a row of the paper stands beside."""
    return [r for r in of_method(rows, str(row.ours)) if row.loras in (None, r.num_kept)]


def _between_methods(config: BenchmarkConfig, table: PaperTable, rows: Sequence[Row]) -> list[Ordering]:
    """Two methods, with the same number of LoRAs."""
    orderings = []
    for pair in combinations([row for row in table.rows if _mine(rows, row)], 2):
        if pair[0].loras != pair[1].loras:
            continue
        for column, measure in COLUMNS.items():
            worse, better = sorted(pair, key=lambda row: row.mean(column))
            if worse.mean(column) == better.mean(column):
                continue
            mine = [*_mine(rows, better), *_mine(rows, worse)]
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


def _between_counts(table: PaperTable, rows: Sequence[Row]) -> list[Ordering]:
    """One method, with the fewest and with the most LoRAs: other compositions, so nothing can be paired."""
    orderings = []
    there = [row for row in table.rows if row.loras is not None and _mine(rows, row)]
    for method in dict.fromkeys(row.method for row in there):
        mine = sorted((row for row in there if row.method == method), key=lambda row: row.loras or 0)
        few, many = mine[0], mine[-1]
        for column, measure in COLUMNS.items():
            before, after = (mean_of(_mine(rows, row), measure) for row in (few, many))
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
