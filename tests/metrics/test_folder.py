"""`mole evaluate`: pictures from anywhere, with the files people really have."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mole_diffusion import toybox
from mole_diffusion.cli import app
from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.metrics import ImageAlignment, TextAlignment, evaluate_folder, load_clip
from tests import ROOT
from tests.tiny.clip import write_clip

PHOTOS = ROOT.parent / "shared" / "data" / "dreambooth" / "images"
PROMPTS = ["a photo of a cat on grass", "a photo of a boot on sand", "a photo of a cat on snow"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures with prompts, and references of two concepts."""
    for name in ("cat", "boot"):
        (tmp_path / name).mkdir()
        for k, picture in enumerate(toybox.references(name)):
            picture.save(tmp_path / name / f"{k}.png")
    (tmp_path / "pictures").mkdir()
    for k, picture in enumerate([*toybox.references("cat")[:2], toybox.references("boot")[0]]):
        picture.resize((64 + 16 * k, 64)).save(tmp_path / "pictures" / f"{k}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return tmp_path


def mole(folder: Path, *more: str, clip: str = "toybox") -> Any:
    references = [part for name in ("cat", "boot") for part in ("--references", f"{name}={folder / name}")]
    inputs = ["--images", str(folder / "pictures"), "--prompts", str(folder / "prompts.txt"), *references]
    options = ["--clip", clip, "--out", str(folder / "out.csv"), "--device", "cpu", *more]
    return CliRunner().invoke(app, ["evaluate", *inputs, *options])


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "out.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_are_the_metrics_of_each_picture(folder: Path) -> None:
    done = mole(folder)
    assert done.exit_code == 0, done.output
    clip = DifferentiableCLIP(toybox.clip_dir())
    known = {name: toybox.references(name) for name in ("cat", "boot")}
    rows = table(folder)
    assert [(row["picture"], row["prompt"]) for row in rows] == list(
        zip(["0.png", "1.png", "2.png"], PROMPTS, strict=True)
    )
    for row in rows:
        with Image.open(folder / "pictures" / row["picture"]) as file:
            picture = file.convert("RGB")
        for scale in ("cosine", "clipscore"):
            text = TextAlignment(clip, scale)
            text.update([picture], [row["prompt"]])
            name = f"text alignment ({scale})"
            assert float(row[name]) == pytest.approx(float(text.compute()[name]), abs=1e-5)
        image = ImageAlignment(clip, known)
        image.update([picture])
        for concept, value in image.compute().items():
            assert float(row[f"image alignment: {concept}"]) == pytest.approx(float(value), abs=1e-5)
    mean = sum(float(row["image alignment: mean"]) for row in rows) / 3
    assert f"{mean:.4f}" in done.stdout


def test_a_truncated_picture_is_named_and_the_others_are_measured(folder: Path) -> None:
    mole(folder)
    before = table(folder)
    broken = folder / "pictures" / "1.png"
    broken.write_bytes(broken.read_bytes()[:200])
    done = mole(folder)
    assert done.exit_code == 1
    assert f"mole: {broken} cannot be read as a picture" in done.stderr
    after = table(folder)
    assert [row["picture"] for row in after] == ["0.png", "2.png"]
    for row, old in zip(after, [before[0], before[2]], strict=True):
        assert float(row["text alignment (cosine)"]) == pytest.approx(float(old["text alignment (cosine)"]), abs=1e-6)


def test_wrong_input_is_said_before_anything_is_measured(folder: Path) -> None:
    (folder / "prompts.txt").write_text("one\ntwo\n")
    wrong_count = mole(folder)
    (folder / "prompts.txt").write_text("one for all\n")
    unknown = mole(folder, clip="ViT-B-32")
    shutil.rmtree(folder / "boot")
    (folder / "boot").mkdir()
    no_pictures = mole(folder)
    (folder / "boot" / "0.png").write_bytes(b"\x89PNG")
    broken_reference = mole(folder)
    shutil.rmtree(folder / "pictures")
    none = mole(folder)
    before_clip = mole(folder, clip="ViT-B-32:openai")  # whose weights would be asked from the Hub
    for done, message in (
        (wrong_count, "has 2 prompts, and there are 3 pictures"),
        (no_pictures, f"references of concept 'boot': {folder / 'boot'}: no picture in this folder"),
        (broken_reference, "references of concept 'boot': "),
        (none, f"--images {folder / 'pictures'}: there is no such file or folder"),
        (before_clip, f"--images {folder / 'pictures'}: there is no such file or folder"),
        (unknown, "'ViT-B-32' is no CLIP"),
    ):
        assert done.exit_code == 2, done.output
        assert message in done.stderr
    assert not (folder / "out.csv").exists()


def test_prompts_by_name(folder: Path) -> None:
    clip = load_clip("toybox")
    names = folder / "prompts.json"
    names.write_text(json.dumps({"2.png": PROMPTS[2], "0.png": PROMPTS[0], "1.png": PROMPTS[1], "9.png": "?"}))
    by_name = evaluate_folder(folder / "pictures", names, {}, clip)
    by_line = evaluate_folder(folder / "pictures", folder / "prompts.txt", {}, clip)
    assert by_name == by_line
    names.write_text(json.dumps({"0.png": PROMPTS[0]}))
    with pytest.raises(ValueError, match=r"has no prompt for 2 of 3 pictures: 1\.png"):
        evaluate_folder(folder / "pictures", names, {}, clip)
    names.write_text("[]")
    with pytest.raises(ValueError, match="must hold an object of picture names to prompts"):
        evaluate_folder(folder / "pictures", names, {}, clip)


def test_what_clip_does_not_read_is_said_in_a_line(folder: Path) -> None:
    (folder / "prompts.txt").write_text("a cat and a boot " * 20)
    done = mole(folder)
    assert done.exit_code == 0
    said = [line for line in done.stderr.splitlines() if line.startswith("mole: 1 of 1 prompts are longer than the 52")]
    assert len(said) == 1


# Somebody's photos, which this repository may not contain; the tests above run the same path on drawn pictures.
@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photos at {PHOTOS}")
def test_real_photos_run_through(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = write_clip(tmp_path / "clip")
    shutil.copytree(PHOTOS / "cat", tmp_path / "pictures")
    for name in ("cat", "boot"):
        shutil.copytree(PHOTOS / {"boot": "fancy_boot"}.get(name, name), tmp_path / name)
    (tmp_path / "prompts.txt").write_text("a photo of a cat\n")
    done = mole(tmp_path, clip=str(clip))
    assert done.exit_code == 0, done.output
    rows = table(tmp_path)
    assert len(rows) == len(list((PHOTOS / "cat").iterdir()))
    for row in rows:
        assert -1 <= float(row["text alignment (cosine)"]) <= 1
        assert float(row["image alignment: cat"]) <= 1
