"""Picture sheets and heat maps: what is on them, and where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mole_diffusion.sheets import gate_heat_map, picture_sheet

RED, GREEN = (255, 0, 0), (0, 255, 0)


def read(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.convert("RGB")


def columns_of(sheet: Image.Image, colour: tuple[int, int, int]) -> set[int]:
    return {x for x in range(sheet.width) for y in range(0, sheet.height, 7) if sheet.getpixel((x, y)) == colour}


def test_small_pictures_are_enlarged_by_whole_factors_and_large_ones_reduced(tmp_path: Path) -> None:
    small, large = Image.new("RGB", (64, 64), RED), Image.new("RGB", (512, 512), GREEN)
    path = picture_sheet([("one\ntwo", [small, large])], tmp_path / "new" / "sheet.png", title="title", cell=160)
    sheet = read(path)
    red, green = columns_of(sheet, RED), columns_of(sheet, GREEN)
    assert len(red) == 128
    assert len(green) == 160
    assert max(red) < min(green)


def test_labels_stand_left_of_the_pictures_and_are_never_cut(tmp_path: Path) -> None:
    label = "a label that is rather long for so small a picture"
    path = picture_sheet([(label, [Image.new("RGB", (32, 32), RED)])], tmp_path / "sheet.png", cell=64)
    sheet = read(path).convert("L")
    start = min(columns_of(read(path), RED))
    dark = [x for x in range(start) for y in range(sheet.height) if sheet.getpixel((x, y)) < 100]
    assert dark
    assert max(dark) < start - 4
    assert start > 200


def test_an_empty_sheet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every row is empty"):
        picture_sheet([("nothing", [])], tmp_path / "sheet.png")
    assert list(tmp_path.iterdir()) == []


def test_a_heat_map_grows_with_its_table(tmp_path: Path) -> None:
    def height(places: int) -> int:
        weights = torch.full((places, 2), 0.5)
        weights[0, 0] = float("nan")
        names = [f"unet.block.{k}" for k in range(places)]
        return read(gate_heat_map(weights, names, ["cat", "dog"], tmp_path / "map.png", title="gates")).height

    assert height(12) > height(3) + 100


def test_a_heat_maps_title_is_not_cut_where_few_loras_make_it_narrow(tmp_path: Path) -> None:
    names = [f"unet.down_blocks.{k}.attentions.0.transformer_blocks.0.attn1" for k in range(3)]
    title = "mole on expert outputs: gates, mean over steps and pictures"
    for weights, loras in ((torch.zeros(3, 1), ["cat"]), (torch.zeros(3, 3), ["cat", "boot", "teapot"])):
        drawn = np.asarray(read(gate_heat_map(weights, names, loras, tmp_path / "map.png", title=title)).convert("L"))
        assert (drawn[:, :3] == 255).all()
        assert (drawn[:, -3:] == 255).all()


def test_a_heat_map_needs_names_for_its_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be \(places, LoRAs\) = \(1, 2\), got \(2, 2\)"):
        gate_heat_map(torch.zeros(2, 2), ["one"], ["cat", "dog"], tmp_path / "map.png")
