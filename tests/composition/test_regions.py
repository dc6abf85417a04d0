"""Regions a user gives, in every form, and the map they become."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from mole_diffusion.composition.regions import RegionMap
from mole_diffusion.errors import MoLEError

PICTURE = (64, 128)  # height, width
GRID = (8, 16)


def drawn(regions, names=("cat", "boot"), feather=0, rows=1, grid=GRID) -> RegionMap:
    return RegionMap.from_regions(regions, names, image_size=PICTURE, grid=grid, rows=rows, feather=feather)


def left_half() -> torch.Tensor:
    plane = torch.zeros(GRID)
    plane[:, :8] = 1
    return plane


@pytest.mark.parametrize(
    "region",
    [
        (0, 0, 0.5, 1),
        (0, 0, 64, 64),
        [0.0, 0.0, 0.5, 1.0],
        [(0, 0), (0.5, 0), (0.5, 1), (0, 1)],
        [(0, 0), (64, 0), (64, 64), (0, 64)],
        [(0, 0, 0.25, 1), (0.25, 0, 0.5, 1)],
        [(0, 0, 0.3, 1), [(0.2, 0), (0.5, 0), (0.5, 1), (0.2, 1)]],
        left_half().bool(),
        left_half(),
        left_half().double().numpy(),
        (255 * left_half()).to(torch.uint8).numpy(),
        Image.fromarray((255 * left_half()).to(torch.uint8).numpy()).resize((128, 64), Image.Resampling.NEAREST),
        Image.fromarray((255 * left_half()).to(torch.uint8).numpy()).convert("RGBA"),
        Image.fromarray((65535 * left_half()).numpy().astype(np.uint16)),
        Image.fromarray(left_half().numpy()),
        Image.fromarray((255 * left_half()).to(torch.uint8).numpy()).convert("1"),
        Image.fromarray((255 * left_half()).to(torch.uint8).numpy()).convert("P"),
    ],
)
def test_every_form_of_the_left_half_is_the_left_half(region):
    regions = drawn({"cat": region})
    assert torch.equal(regions.values[0, 0], left_half())
    assert not regions.values[0, 1].any()
    assert (regions.names, regions.fixed) == (("cat", "boot"), ("cat",))


def test_a_picture_that_is_transparent_somewhere_counts_by_its_alpha_alone():
    black = Image.new("RGBA", (128, 64), (0, 0, 0, 0))
    ImageDraw.Draw(black).rectangle((0, 0, 63, 63), fill=(0, 0, 0, 255))
    assert torch.equal(drawn({"cat": black}).values[0, 0], left_half())


def test_cells_are_covered_by_area_and_slanted_edges_too():
    box = drawn({"cat": (0, 0, 4, 8 * 2.5)}).values[0, 0]
    assert box[:4, 0].tolist() == [0.5, 0.5, 0.25, 0]
    triangle = drawn({"cat": [(0, 0), (1, 0), (0, 1)]}).values[0, 0]
    assert triangle.mean().item() == pytest.approx(0.5, abs=0.005)
    assert triangle[0, 0] == 1
    assert triangle[-1, -1] == 0


def test_overlap_is_shared_and_boxes_that_meet_in_a_cell_do_not_overlap():
    three = drawn({"a": (0, 0, 1, 1), "b": (0, 0, 0.5, 1), "c": (0, 0, 0.25, 1)}, names=("a", "b", "c")).values[0]
    assert torch.allclose(three[:, 0, 0], torch.full((3,), 1 / 3))
    assert three[:, 0, 5].tolist() == [0.5, 0.5, 0]
    assert three[:, 0, 12].tolist() == [1, 0, 0]
    meeting = drawn({"cat": (0, 0, 2, 64), "boot": (2, 0, 16, 64)}).values[0]
    assert meeting[:, 0, 0].tolist() == [0.25, 0.75]
    crossing = drawn({"cat": (0, 0, 4, 64), "boot": (2, 0, 16, 64)}).values[0]
    assert crossing[:, 0, 0].tolist() == [0.25 + 0.25 / 2, 0.25 / 2 + 0.5]
    twice = drawn({"cat": [(0, 0, 1, 1), (0, 0, 1, 1)], "boot": (0, 0, 1, 1)}).values[0]
    assert twice[:, 0, 0].tolist() == [0.5, 0.5]  # several regions are united, not added


def test_edges_are_feathered_by_a_cell_and_the_picture_s_rim_is_no_edge():
    for feather, expected in ((1, [1, 1, 2 / 3, 1 / 3, 0, 0]), (2, [1, 0.8, 0.6, 0.4, 0.2, 0])):
        cat = drawn({"cat": (0, 0, 0.5, 1)}, feather=feather).values[0, 0]
        assert torch.allclose(cat[3, 5:11], torch.tensor(expected).float())
        assert torch.equal(cat[:, 0], torch.ones(8))
    both = drawn({"cat": (0, 0, 0.6, 1), "boot": (0.4, 0, 1, 1)}, feather=1).values
    assert both.sum(dim=1).max() <= 1 + 1e-6


def test_another_grid_gets_the_mean_of_the_area_in_rows_of_tokens():
    regions = drawn({"cat": (0, 0, 0.25, 0.5), "boot": (0.5, 0, 1, 1)})
    assert regions.at(2, 4).tolist() == [[[1, 0], [0, 0], [0, 1], [0, 1], [0, 0], [0, 0], [0, 1], [0, 1]]]
    assert regions.at(1, 1)[0, 0].tolist() == [0.125, 0.5]
    assert torch.equal(
        regions.at(16, 32)[0, :, 0].reshape(16, 32),
        regions.at(8, 16)[0, :, 0].reshape(8, 16).repeat_interleave(2, 0).repeat_interleave(2, 1),
    )
    assert regions.at(2, 4) is regions.at(2, 4)
    assert regions.at(2, 4, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert regions.at(3, 5).sum(dim=-1).max() <= 1 + 1e-6


def test_rows_are_alike_unless_a_map_of_an_earlier_call_differs_in_them():
    assert drawn({"cat": (0, 0, 0.5, 1)}, rows=3).at(4, 4).shape == (3, 16, 2)
    values = torch.zeros(2, 1, *GRID)
    values[1] = 0.5
    earlier = RegionMap(values, ("boot",))
    again = drawn(earlier, rows=2)
    assert again.fixed == ("boot",)
    assert torch.equal(again.values[:, 1:], values)
    assert not again.values[:, 0].any()
    assert drawn(RegionMap(values[:1], ("boot",)), rows=4).rows == 4
    with pytest.raises(MoLEError, match="has 2 rows, but this call draws 3"):
        drawn(earlier, rows=3)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Image.new("I", (8, 8), 255), "is a picture that cannot be read: it holds integers of 32 bits, and nobody"),
        ((0, 0, 0, 1), r"'cat' is the box \(0, 0, 0, 1\), which is empty or reversed. Give \(left, top"),
        ((0.5, 0, 0.2, 1), "empty or reversed"),
        ((200, 0, 300, 64), r"covers nothing of the picture of 128 x 64 pixels: it lies outside or has no area"),
        ((-9, -9, -1, -1), "covers nothing"),
        ((-0.1, 0, 0.5, 1), "read as pixels.*less than 2 pixels"),
        ((0, 0, 1), r"has 3 numbers, \(0, 0, 1\). Give a box"),
        ((0, 0, float("nan"), 1), "not finite"),
        ([(0, 0), (1, float("inf")), (0, 1)], "not finite"),
        ([(0, 0), (1, 1)], "polygon of 2 points. Give at least three"),
        ([(0, 0), (1, 1), (0.5, 0.5)], "covers nothing"),
        ([], "empty list"),
        ("left", "is 'left'. Give a box"),
        (None, "is None. Give a box"),
        (np.zeros((4, 4, 3), np.uint8), r"shape \(4, 4, 3\). Give a mask of shape \(height, width\)"),
        (torch.zeros(4, 4), "empty .zero everywhere.. Paint where 'cat' belongs in white"),
        (Image.new("L", (4, 4)), "empty"),
        (torch.full((4, 4), 2.0), r"values from 2 to 2. Give finite values in \[0, 1\]"),
        (torch.full((4, 4), float("nan")), "values from nan"),
        (np.ones((4, 4), np.uint8), "uint8 with nothing above 1"),
        (np.ones((4, 4), np.int64), "type torch.int64. Give bool"),
        (np.array([["a", "b"]]), "array of type"),
    ],
)
def test_a_region_that_cannot_be_meant_says_what_to_give(region, message):
    with pytest.raises(MoLEError, match=message):
        drawn({"cat": region})


def test_an_unknown_name_lists_the_known():
    with pytest.raises(MoLEError, match=r"has dog, which is none of the LoRAs in use: cat, boot"):
        drawn({"dog": (0, 0, 1, 1)})
    with pytest.raises(MoLEError, match=r"`regions` is a list. Give \{name: region\}"):
        drawn([(0, 0, 1, 1)])
    with pytest.raises(MoLEError, match="`feather` is -1"):
        drawn({"cat": (0, 0, 1, 1)}, feather=-1)


@pytest.mark.parametrize(
    ("values", "names", "fixed", "message"),
    [
        (torch.zeros(2, 4, 4), ("cat", "boot"), (), r"shape \(2, 4, 4\). Give \(rows, 2, height, width\)"),
        (torch.zeros(1, 3, 4, 4), ("cat", "boot"), (), r"shape \(1, 3, 4, 4\)"),
        (torch.zeros(1, 2, 0, 4), ("cat", "boot"), (), "shape"),
        (torch.zeros(1, 2, 4, 4).double(), ("cat", "boot"), (), "Give float32"),
        (torch.full((1, 2, 4, 4), -0.1), ("cat", "boot"), (), "values from -0.1"),
        (torch.full((1, 2, 4, 4), float("nan")), ("cat", "boot"), (), "values from nan"),
        (torch.full((1, 2, 4, 4), 0.6), ("cat", "boot"), (), "sum to 1.2"),
        (torch.zeros(1, 2, 4, 4), ("cat", "cat"), (), "names a LoRA twice"),
        (torch.zeros(1, 2, 4, 4), ("cat", "boot"), ("dog",), "`fixed` has dog"),
    ],
)
def test_a_map_checks_what_it_is_made_of(values, names, fixed, message):
    with pytest.raises(MoLEError, match=message):
        RegionMap(values, names, fixed)


def test_what_is_saved_edited_and_loaded_again_can_be_given_again(tmp_path: Path):
    regions = drawn({"cat/a": (0, 0, 0.5, 1), "Cat_a": (0.25, 0, 1, 1)}, names=("cat/a", "Cat_a", "overlay"), feather=1)
    regions.save(tmp_path, [Image.new("RGB", (128, 64), "red")])
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "Cat_a_2-0.png", "cat_a-0.png", "overlay-0.png", "overlay_2-0.png", "regions.json",
    ]  # fmt: skip
    with Image.open(tmp_path / "cat_a-0.png") as image:
        assert (image.size, image.mode) == ((128, 64), "L")
    loaded = RegionMap.load(tmp_path)
    assert (loaded.names, loaded.fixed) == (regions.names, ("cat/a", "Cat_a"))
    assert torch.allclose(loaded.at(*GRID), regions.at(*GRID), atol=1 / 255)

    # A paint program: all of it white, the right half rubbed out, saved with transparency.
    painted = Image.new("RGBA", (128, 64), "white")
    painted.paste((255, 255, 255, 0), (64, 0, 128, 64))
    painted.save(tmp_path / "cat_a-0.png")
    edited = RegionMap.load(tmp_path)
    assert edited.values.sum(dim=1).max() <= 1 + 1e-6
    boot = regions.at(1, 16)[0, :, 1]
    assert torch.allclose(edited.at(1, 16)[0, :8, 0], 1 / (1 + boot[:8]), atol=0.01)  # shared where both are
    assert not edited.at(1, 16)[0, 8:, 0].any()
    again = RegionMap.from_regions(edited, regions.names, image_size=PICTURE, grid=GRID, rows=2)
    assert again.fixed == regions.names
    assert torch.allclose(again.at(*GRID)[1], edited.at(*GRID)[0])


def test_images_can_be_given_as_regions_and_keep_rows_apart():
    values = torch.zeros(2, 1, *GRID)
    values[1] = left_half()
    images = RegionMap(values, ("cat",)).images()
    assert [image.getextrema() for image in images["cat"]] == [(0, 0), (0, 255)]
    assert torch.equal(drawn({"cat": images["cat"][1]}).values[0, 0], left_half())


def test_an_overlay_tints_each_region_and_names_it_below():
    white = Image.new("RGB", (64, 32), "white")
    [sheet] = drawn({"cat": (0, 0, 0.5, 1), "boot": (0.5, 0, 1, 1)}).overlay([white])
    assert sheet.width == 512  # a small picture is enlarged, so that the legend can be read
    assert sheet.height > 256
    left, right = sheet.getpixel((100, 100)), sheet.getpixel((400, 100))
    assert left[0] > left[2] + 60  # orange
    assert right[2] > right[0] + 60  # blue
    many = tuple(f"a LoRA with a long name, number {number}" for number in range(9))
    plane = RegionMap(torch.full((1, 9, 8, 8), 0.1), many)
    assert plane.overlay([white])[0].height > sheet.height  # the legend wraps
    with pytest.raises(MoLEError, match="1 pictures for a region map of 2 rows"):
        RegionMap(torch.zeros(2, 1, 4, 4), ("cat",)).overlay([white])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "does not list"),
        ('{"files": {"cat": [1]}}', "does not list"),
        ('{"files": {"cat": ["a.png"], "boot": []}}', "does not list"),
        ('{"files": {"cat": ["../a.png"]}}', "not a file beside it"),
        ('{"files": {"cat": ["a.png"]}}', "a.png cannot be read as a picture: no such file"),
    ],
)
def test_a_folder_that_is_not_ours_is_a_clear_error(tmp_path: Path, content, message):
    if content is not None:
        (tmp_path / "regions.json").write_text(content)
    with pytest.raises(MoLEError, match=message):
        RegionMap.load(tmp_path)


def test_masks_scaled_apart_in_a_paint_program_are_a_clear_error(tmp_path: Path):
    drawn({"cat": (0, 0, 0.5, 1)}).save(tmp_path)
    Image.new("L", (3, 5), 255).save(tmp_path / json.loads((tmp_path / "regions.json").read_text())["files"]["cat"][0])
    with pytest.raises(MoLEError, match="differ in size: 3 x 5, 16 x 8"):
        RegionMap.load(tmp_path)
