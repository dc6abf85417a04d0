"""A table of the paper beside our own, by its orderings: digits of another base, CLIP and concepts do not compare."""

from __future__ import annotations

from collections.abc import Sequence

from mole_diffusion.benchmark.config import BenchmarkConfig
from mole_diffusion.benchmark.measures import IMAGE, TEXT
from mole_diffusion.benchmark.report.groups import mean_of
from mole_diffusion.benchmark.report.orderings import COLUMNS, between_counts, between_methods, rows_beside
from mole_diffusion.benchmark.report.paper_table import read_paper
from mole_diffusion.benchmark.row import Row
from mole_diffusion.tables import markdown_table, number


def paper_section(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    """The paper's table beside ours, and of every ordering of two of its numbers whether it holds here."""
    if config.paper is None:
        return ""
    table, whole = read_paper(config.paper), [row for row in rows if row.is_whole]
    lines = []
    for row in table.rows:
        mine = rows_beside(whole, row) if row.ours in config.labels else []
        ours = [number(mean_of(mine, measure)) for measure in COLUMNS.values()]
        count = [] if row.loras is None else [str(row.loras)]
        theirs = [number(row.mean(column)) for column in COLUMNS]
        lines.append([*count, row.method, *theirs, str(row.ours) if mine else "–", *ours])
    header = [*(["LoRAs"] if table.rows[0].loras is not None else []), "in the paper", "text", "image"]
    orderings = [*between_methods(config, table, whole), *between_counts(table, whole)]
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
