"""A table of the paper, read from YAML."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from mole_diffusion.errors import MoLEError
from mole_diffusion.yaml_files import read_yaml


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
