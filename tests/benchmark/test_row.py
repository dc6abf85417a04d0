"""A row of a benchmark in its file: written and read the same, also as it was before numbers had keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mole_diffusion.benchmark import BenchmarkConfig
from mole_diffusion.benchmark.cell import Cell
from mole_diffusion.benchmark.measures import MEASURES
from mole_diffusion.benchmark.row import Row, cell_names, read_row, write_row
from mole_diffusion.errors import MoLEError

CELL: Cell = BenchmarkConfig.from_dict(
    {
        "name": "one",
        "base": "toybox",
        "concepts": "toybox",
        "compositions": ["cat+boot"],
        "methods": ["linear"],
        "prompts": ["{concepts}"],
        "seeds": 1,
        "clip": "toybox",
    }
).cells()[0]
ROW = Row(
    **cell_names(CELL),
    numbers={measure.key: 0.25 * k for k, measure in enumerate(MEASURES)},
    image_by_concept={"cat": 0.5, "boot": 0.25},
    evaluations=25,
    seconds=1.5,
    memory=3.5,
    gates={"unet.a": [0.25, None]},
)
OLD: dict[str, Any] = {
    **cell_names(CELL),
    **{measure.heading: 0.25 * k for k, measure in enumerate(MEASURES)},
    "image alignment by concept": {"cat": 0.5, "boot": 0.25},
    "UNet evaluations": 25,
    "seconds": 1.5,
    "memory (MiB)": 3.5,
    "gates": {"unet.a": [0.25, None]},
}


def test_a_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_row(tmp_path / "row.json", CELL) is None
    for row in (ROW, Row(**cell_names(CELL), error="OSError: no")):
        write_row(tmp_path / "row.json", row)
        assert read_row(tmp_path / "row.json", CELL) == row
    assert json.loads((tmp_path / "row.json").read_text()) == {**cell_names(CELL), "error": "OSError: no"}


def test_a_row_of_before_keys_is_the_same_row(tmp_path: Path) -> None:
    (tmp_path / "row.json").write_text(json.dumps(OLD))
    assert read_row(tmp_path / "row.json", CELL) == ROW
    (tmp_path / "row.json").write_text(json.dumps(OLD | {"memory (MiB)": None}))
    assert read_row(tmp_path / "row.json", CELL).memory is None


@pytest.mark.parametrize(
    "change",
    [
        {"numbers": {"image": 0.5}},
        {"numbers": {measure.key: True for measure in MEASURES}},
        {"numbers": {measure.key: 0.5 for measure in MEASURES} | {"charm": 0.5}},
        {"numbers": []},
        {"image_by_concept": {"cat": "much"}},
        {"seconds": None},
        {"evaluations": float("inf")},
        {"memory": "3 MiB"},
        {"gates": {"unet.a": [0.25]}},
        {"gates": {"unet.a": 0.25}},
        {"colour": 1},
    ],
)
def test_a_row_that_lacks_a_number_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    write_row(tmp_path / "row.json", ROW)
    values = json.loads((tmp_path / "row.json").read_text())
    (tmp_path / "row.json").write_text(json.dumps(values | change))
    with pytest.raises(MoLEError, match=r"row\.json is damaged: a number is missing or is none"):
        read_row(tmp_path / "row.json", CELL)
