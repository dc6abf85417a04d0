"""One picture of a benchmark in numbers, and the file it is kept in."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mole_diffusion.benchmark.cell import Cell
from mole_diffusion.benchmark.measures import IMAGE, MEASURES, TEXT
from mole_diffusion.errors import MoLEError
from mole_diffusion.files import write_json
from mole_diffusion.reading import regular_text


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one picture of a benchmark is and how well it did.

    Attributes:
        composition: Names of its LoRAs, "cat+boot+teapot".
        method: Label of the method.
        kept: The LoRAs that were not masked out, "cat+boot".
        prompt: Index of the prompt.
        seed: Seed of the starting noise.
        numbers: What was measured, by `Measure.key`; the toybox's truths only for pictures of the toybox.
        image_by_concept: Image alignment with each concept.
        evaluations: UNet evaluations of the picture.
        seconds: How long drawing it took.
        memory: MiB that a call takes at its peak beyond the weights; `None` where that cannot be told.
        gates: Place to the mean weight of each LoRA over the steps, `None` where a LoRA does not touch the place.
        error: Why there is no picture; all numbers are missing then.
    """

    composition: str
    method: str
    kept: str
    prompt: int
    seed: int
    numbers: Mapping[str, float] = field(default_factory=dict)
    image_by_concept: Mapping[str, float] = field(default_factory=dict)
    evaluations: int | None = None
    seconds: float | None = None
    memory: float | None = None
    gates: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    error: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all LoRAs of the composition were kept."""
        return self.kept == self.composition

    @property
    def num_kept(self) -> int:
        """How many LoRAs drew the picture."""
        return self.kept.count("+") + 1

    @property
    def loras(self) -> str:
        """The LoRAs in words: the composition, and which of it were kept if not all."""
        return self.composition if self.is_whole else f"{self.composition}, only {self.kept}"

    @property
    def picture(self) -> tuple[str, str, int, int]:
        """What every method draws: a comparison pairs rows that have it in common."""
        return self.composition, self.kept, self.prompt, self.seed


def cell_names(cell: Cell) -> dict[str, Any]:
    """What every row begins with: which cell it is of."""
    return {
        "composition": cell.composition,
        "method": cell.method.label,
        "kept": "+".join(cell.kept),
        "prompt": cell.prompt,
        "seed": cell.seed,
    }


def write_row(path: Path, row: Row) -> None:
    """Writes a row as JSON, without what it does not have, in one step."""
    values = dataclasses.asdict(row)
    write_json(path, {key: value for key, value in values.items() if value is not None and value != {}})


def read_row(path: Path, cell: Cell) -> Row | None:
    """The row of a cell; None where there is none.

    Raises:
        MoLEError: There is something, and it is not the whole row of this cell.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(regular_text(path))
    except (ValueError, RecursionError) as error:
        raise MoLEError(f"{path} is damaged: {error}.") from None
    names = cell_names(cell)
    if not isinstance(values, dict) or any(values.get(key) != value for key, value in names.items()):
        raise MoLEError(f"{path} is damaged: it is not the row of {names}.")
    if isinstance(values.get("error"), str):
        return Row(**names, error=values["error"])
    values = names | _with_keys({key: value for key, value in values.items() if key not in names})
    if not _is_whole(values, len(cell.loras)):
        raise MoLEError(f"{path} is damaged: a number is missing or is none.")
    return Row(**values)


_KEYS = {
    "image alignment by concept": "image_by_concept",
    "UNet evaluations": "evaluations",
    "memory (MiB)": "memory",
}


def _with_keys(values: dict[str, Any]) -> dict[str, Any]:
    """A row of before there were keys, when numbers were named as in the tables and lay beside all else."""
    if "numbers" in values:
        return values
    numbers = {measure.key: values.pop(measure.heading) for measure in MEASURES if measure.heading in values}
    return {"numbers": numbers} | {_KEYS.get(key, key): value for key, value in values.items()}


def _is_whole(values: Mapping[str, Any], num_loras: int) -> bool:
    """Whether a row has every number that a picture always has, and what it has are finite numbers of known names."""
    numbers, by_concept, gates = (values.get(key, {}) for key in ("numbers", "image_by_concept", "gates"))
    return (
        set(values) <= {field.name for field in dataclasses.fields(Row)}
        and all(isinstance(part, dict) for part in (numbers, by_concept, gates))
        and {TEXT.key, IMAGE.key} <= set(numbers) <= {measure.key for measure in MEASURES}
        and all(_is_number(value) for value in (*numbers.values(), *by_concept.values()))
        and all(_is_number(values.get(key)) for key in ("evaluations", "seconds"))
        and (values.get("memory") is None or _is_number(values["memory"]))
        and all(
            isinstance(weights, list)
            and len(weights) == num_loras
            and all(value is None or _is_number(value) for value in weights)
            for weights in gates.values()
        )
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
