"""The report of a benchmark, from rows made up so that what it must say is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mole_diffusion.benchmark import BenchmarkConfig, write_report
from mole_diffusion.benchmark.cell import Cell
from mole_diffusion.benchmark.report.paper_table import read_paper
from mole_diffusion.benchmark.report.plots import mark
from mole_diffusion.benchmark.row import Row, cell_names, write_row
from mole_diffusion.benchmark.run import picture_path
from mole_diffusion.files import write_json
from mole_diffusion.tables import number

PAPER = """
title: A table
note: A note.
rows:
  - {method: Plain, ours: normalized, loras: 2, text: [0.5, 0.6], image: [0.5, 0.7]}
  - {method: Other, loras: 2, text: 0.5, image: 0.5}
  - {method: Gated, ours: layer, loras: 2, text: [0.6, 0.7], image: [0.6, 0.6]}
  - {method: Plain, ours: normalized, loras: 3, text: 0.5, image: 0.8}
  - {method: Gated, ours: layer, loras: 3, text: 0.4, image: 0.7}
"""
STUDY: dict[str, Any] = {
    "name": "made up",
    "base": "toybox",
    "concepts": "toybox",
    "compositions": ["cat+boot", "mug+robot", "cat+boot+teapot"],
    "methods": ["normalized", {"mole": {"label": "layer"}}, "linear"],
    "train_prompts": ["{concepts}"],
    "prompts": ["a photo of {concepts} on grass"],
    "seeds": 8,
    "clip": "toybox",
}
TEXT, IMAGE = "text alignment (clipscore)", "image alignment"


def config(**changes: Any) -> BenchmarkConfig:
    return BenchmarkConfig.from_dict(STUDY | changes)


def made_up(cell: Cell, **changes: float) -> Row:
    """Gates help text by 0.1 with two LoRAs, and not at all with three; in image alignment nobody can tell."""
    rng = np.random.default_rng([cell.seed, len(cell.composition)])
    noise, coin = rng.normal(0, 0.01), (-1) ** cell.seed
    gated, three = cell.method.label == "layer", len(cell.loras) == 3
    numbers = {
        "text_clipscore": 0.5 + 0.1 * gated * (not three) - 0.05 * gated * three + noise,
        "image": 0.5 + 0.1 * gated * coin + 0.01 * gated + 0.1 * three,
        "presence": 0.25 * (cell.seed % 4) + (0.25 if gated else 0),
        "all_present": float(cell.seed > 3),
        "confusion": 0.5,
    } | changes
    gates = {"unet.a": [0.25, 0.75], "unet.b": [None, 1.0]} if gated and not three else {}
    return Row(**cell_names(cell), numbers=numbers, evaluations=25, seconds=60.0, gates=gates)


def fill(study: BenchmarkConfig, out: Path, row: Callable[[Cell], Row] = made_up) -> list[Row]:
    rows = [row(cell) for cell in study.cells()]
    for cell, one in zip(study.cells(), rows, strict=True):
        write_row((out / "rows" / cell.path).with_suffix(".json"), one)
    return rows


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "paper.yaml").write_text(PAPER)
    study = config(paper=str(folder / "paper.yaml"))
    fill(study, folder / "out")
    for cell in study.cells()[:3]:
        path = picture_path(folder / "out", cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    for names, seconds in (("cat+boot", 600.0), ("mug+robot", 300.0)):
        write_json(folder / "out" / "gates" / "layer" / names / "seconds.json", seconds)
    return write_report(study, folder / "out", page=folder / "docs" / "made-up.md")


def test_every_ordering_of_the_paper_is_judged(page: Path) -> None:
    beside = section(page.read_text(encoding="utf-8"), "Beside the paper")
    said = [line for line in beside.splitlines() if line.startswith("- ")]
    verdicts = {line[2:].split(" (")[0] if TEXT not in line else line[2:].split(" (0")[0]: line for line in said}
    assert len(said) == 7  # with two LoRAs, the image alignments of the paper are equal; Other has no counterpart
    gain = verdicts[f"{TEXT} with 2 LoRAs, Gated over Plain"]
    assert "(0.650 over 0.550 in the paper): holds; layer − normalized is +0.100 [+0.100, +0.100]" in gain
    assert "In the paper that is so in 2 of 2 compositions, here in 2 of 2." in gain
    loss = verdicts[f"{TEXT} with 3 LoRAs, Plain over Gated"]
    assert ": holds; normalized − layer is +0.050" in loss
    tossed = verdicts[f"{IMAGE} with 3 LoRAs, Plain over Gated"]
    assert ": does not hold, but the interval has 0 inside" in tossed
    assert (
        "rises (0.600 to 0.800 in the paper): holds; 0.500 to 0.600 here"
        in verdicts[f"{IMAGE}, Plain from 2 to 3 LoRAs rises"]
    )
    assert "falls (0.650 to 0.400 in the paper): holds" in verdicts[f"{TEXT}, Gated from 2 to 3 LoRAs falls"]
    held = sum(": holds" in line for line in said)
    assert f"{held} of 7 orderings hold, 2 of these with an interval that leaves out 0." in beside
    assert "| 2 | Other | 0.500 | 0.500 | – | – | – |" in beside


def test_differences_are_paired_with_the_reference(page: Path) -> None:
    differences = section(page.read_text(encoding="utf-8"), "Difference to normalized")
    line = next(line for line in differences.splitlines() if line.startswith("| layer |"))
    assert line.startswith("| layer | +0.050 [")
    assert "| linear | +0.000 [+0.000, +0.000] |" in differences
    assert "| normalized |" not in differences


def test_correlations_with_the_truth(page: Path, tmp_path: Path) -> None:
    rows = fill(config(), tmp_path)
    text, presence = ([row.numbers[key] for row in rows] for key in ("text_clipscore", "presence"))
    table = section(page.read_text(encoding="utf-8"), "How far can one trust alignment?")
    line = next(line for line in table.splitlines() if line.startswith(f"| {TEXT} | 72 pictures |"))
    cells = [cell.strip() for cell in line.split("|")]
    # Ranks by counting, those that tie in the middle.
    ranks = [[np.sum(np.less(v, x)) + np.mean(np.arange(np.sum(np.equal(v, x)))) for x in v] for v in (text, presence)]
    pearson, spearman = np.corrcoef(text, presence)[0, 1], np.corrcoef(*ranks)[0, 1]
    assert cells[3] == f"{number(pearson, 2)} / {number(spearman, 2)}"
    assert cells[5] == "– / –"  # the confusion rate never changes
    assert f"| {TEXT} | 3 means of methods |" in table
    two = config(methods=["normalized", "linear"])
    fill(two, tmp_path / "two")
    text_of_two = write_report(two, tmp_path / "two").read_text(encoding="utf-8")
    assert "means of methods" not in section(text_of_two, "How far can one trust alignment?")  # two make a line


def test_numbers_of_loras_and_cost(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    counts = section(text, "By number of LoRAs that draw")
    assert [line.split("|")[1:4] for line in counts.splitlines() if line[2:3].isdigit()] == [
        [f" {count} ", f" {label} ", f" {8 * compositions} "]
        for count, compositions in ((2, 2), (3, 1))
        for label in ("normalized", "layer", "linear")
    ]
    cost = section(text, "Cost of a picture")
    assert "| layer | 25 | 60.00 | 15.0 |" in cost
    assert "Drawing took 72 minutes and training 15, summed over processes." in cost
    assert "GPU" not in cost


def test_the_best_of_a_composition_is_bold_unless_all_tie(page: Path) -> None:
    table = section(page.read_text(encoding="utf-8"), "Compositions")
    assert "| cat+boot | 0.500 | **0.510** | 0.500 |" in table
    assert "| cat+boot | 0.500 | 0.500 | 0.500 |" in table  # all-present rate


def test_a_page_has_its_pictures_beside_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert links == ["made-up/scatter.png", "made-up/gates-layer-cat+boot.png", "made-up/cat+boot.png"]
    for link in links:
        assert (page.parent / link).stat().st_size < 300_000
        with Image.open(page.parent / link) as picture:
            assert picture.mode == "P"
    assert sorted(path.name for path in (page.parent / "made-up").iterdir()) == sorted(link[8:] for link in links)


def test_masks_have_lines_of_their_own(tmp_path: Path) -> None:
    study = config(compositions=["cat+boot"], keep=["all", 1], seeds=1)
    fill(study, tmp_path, lambda cell: made_up(cell, text_clipscore=float(len(cell.kept))))
    text = write_report(study, tmp_path).read_text(encoding="utf-8")
    assert "| cat+boot, only boot | 1.000 | 1.000 | 1.000 |" in section(text, "Compositions")
    counts = section(text, "By number of LoRAs that draw")
    assert "| 1 | linear | 2 | 1.000 |" in counts
    assert "| 2 | linear | 1 | 2.000 |" in counts


def test_failures_are_counted_and_not_listed(tmp_path: Path) -> None:
    study = config()

    def without_linear(cell: Cell) -> Row:
        return Row(**cell_names(cell), error="OSError: no") if cell.method.label == "linear" else made_up(cell)

    fill(study, tmp_path, without_linear)
    text = write_report(study, tmp_path).read_text(encoding="utf-8")
    assert "| cat+boot | linear | OSError: no | 8 |" in section(text, "Failed")
    assert "48 pictures measured, 24 failed, 0 missing" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: x", "is no table of a paper: KeyError"),
        (
            "title: x\nnote: y\nrows:\n  - {method: A, text: [1, 2], image: 1}",
            "A has 2 numbers for text and 1 for image",
        ),
        ("title: x\nnote: y\nrows:\n  - {method: A, text: much, image: 1}", "could not convert string"),
    ],
)
def test_a_broken_table_of_a_paper_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "paper.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_paper(tmp_path / "paper.yaml")


def test_the_config_looks_for_the_paper_beside_it(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(json.dumps(STUDY | {"paper": "tables/paper.yaml"}))
    assert BenchmarkConfig.from_file(tmp_path / "study.yaml").paper == str(tmp_path / "tables" / "paper.yaml")


def test_no_two_methods_have_dots_alike() -> None:
    assert len({mark(index) for index in range(60)}) == 60
