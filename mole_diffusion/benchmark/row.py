"""The rows of a benchmark, looked at from several sides."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mole_diffusion.benchmark.config import BenchmarkConfig, Cell
from mole_diffusion.errors import MoLEError
from mole_diffusion.metrics.alignment import text_name

TEXT, IMAGE = text_name("clipscore"), "image alignment"
HIGHER_IS_BETTER = {
    TEXT: True,
    IMAGE: True,
    "region alignment": True,
    "presence rate": True,
    "all-present rate": True,
    "omission rate": False,
    "confusion rate": False,
    text_name("cosine"): True,
    "detection rate": True,
    "count error": False,
}
SHOWN = list(HIGHER_IS_BETTER)[:7]
"""Those that tables in the report have room for; the others are in the CSV files."""

Row = dict[str, Any]
_NUMBERS = (TEXT, IMAGE, "UNet evaluations", "seconds")  # every row that was measured has them


def read_row(path: Path, cell: Cell) -> Row | None:
    """The row of a cell; None where there is none.

    Raises:
        MoLEError: There is something, and it is not the whole row of this cell.
    """
    if not path.exists():
        return None
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MoLEError(f"{path} is damaged: {error}.") from None
    named = row_names(cell)
    if not isinstance(row, dict) or any(row.get(key) != value for key, value in named.items()):
        raise MoLEError(f"{path} is damaged: it is not the row of {named}.")
    rest = {key: value for key, value in row.items() if key not in named}
    if isinstance(rest.get("error"), str):
        return row
    nested = {key: rest.pop(key) for key in ("image alignment by concept", "gates") if key in rest}
    by_concept, gates = nested.get("image alignment by concept", {}), nested.get("gates", {})
    whole = (
        all(_is_number(rest.get(name)) for name in _NUMBERS)
        and all(value is None or _is_number(value) for value in rest.values())
        and isinstance(by_concept, dict)
        and all(_is_number(value) for value in by_concept.values())
        and isinstance(gates, dict)
        and all(
            isinstance(weights, list)
            and len(weights) == len(cell.loras)
            and all(value is None or _is_number(value) for value in weights)
            for weights in gates.values()
        )
    )
    if not whole:
        raise MoLEError(f"{path} is damaged: a number is missing or is none.")
    return row


def row_names(cell: Cell) -> Row:
    """What every row begins with: which cell it is of."""
    return {
        "composition": cell.composition,
        "method": cell.method.label,
        "kept": "+".join(cell.kept),
        "prompt": cell.prompt,
        "seed": cell.seed,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def measured(rows: Sequence[Row]) -> list[str]:
    """The measures of the tables, as far as rows have them."""
    return [name for name in SHOWN if any(name in row for row in rows)]


def labels(config: BenchmarkConfig) -> list[str]:
    return [method.label for method in config.methods]


def case(row: Row) -> str:
    """What was drawn: the composition, and which of its LoRAs were kept if not all."""
    return row["composition"] if is_whole(row) else f"{row['composition']}, only {row['kept']}"


def is_whole(row: Row) -> bool:
    """Whether all LoRAs of the composition were kept."""
    return bool(row["kept"] == row["composition"])


def num_kept(row: Row) -> int:
    """How many LoRAs drew the picture."""
    return row["kept"].count("+") + 1


def of(rows: Sequence[Row], method: str) -> list[Row]:
    return [row for row in rows if row["method"] == method]


def mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None


def by_picture(rows: Sequence[Row], method: str, name: str) -> dict[tuple[str, str, int, int], float]:
    """What every method draws, to the method's number there: what a comparison pairs."""
    return {
        (row["composition"], row["kept"], row["prompt"], row["seed"]): row[name]
        for row in of(rows, method)
        if name in row
    }


def by_case(config: BenchmarkConfig, rows: Sequence[Row], name: str) -> dict[str, dict[str, float]]:
    """Case to method to mean."""
    means: dict[str, dict[str, float]] = {}
    for one in dict.fromkeys(case(row) for row in rows):
        mine = [row for row in rows if case(row) == one]
        for label in labels(config):
            value = mean(of(mine, label), name)
            if value is not None:
                means.setdefault(one, {})[label] = value
    return means
