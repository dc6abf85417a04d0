"""The demo, and the toybox by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mole_diffusion import toybox
from tests.command import drawing, mole, picture
from tests.composing import NAMES


@pytest.fixture
def tiny_toybox(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny world in the place of the toybox, to try the demo's own code in seconds."""
    replacements = {
        "base_dir": lambda: world / "base",
        "demo_subjects": lambda: list(NAMES),
        "token": lambda name: f"<{name}>",
        "subject_prompt": lambda names, ground: f"{' '.join(names)} on {ground}",
        "references": lambda name: [picture(world / "pictures" / f"{name}.png")],
        "lora_path": lambda name: world / f"{name}.safetensors",
        "gates_dir": lambda names: {"cat+dog+mug": world / "gates"}[names],
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(toybox, name, replacement, raising=False)


@pytest.mark.usefixtures("tiny_toybox")
def test_demo_draws_a_sheet_and_says_who_got_what(tmp_path: Path) -> None:
    done = mole("demo", "--out", tmp_path, "--steps", 1, "--device", "cpu")
    assert done.exit_code == 0, done.output
    sheet, heat_map = picture(tmp_path / "sheet.png"), picture(tmp_path / "gates.png")
    assert sheet.height > 11 * 192  # references, masks, norm router, regions, sums, gates, each alone
    assert sheet.width > 3 * 192
    assert min(heat_map.size) > 300
    assert picture(tmp_path / "first.png").width > 5 * 192  # three files, all of them, and where
    assert '"cat dog mug on grass"' in done.stdout
    places = "".join(line.split("│")[1].strip() for line in done.stdout.splitlines() if line.startswith("│"))
    for spec in ("unet.mid_block.attentions.0.transformer_blocks.0", "text_encoder."):
        assert spec in places  # never cut, so that no two look alike
    assert str(tmp_path / "sheet.png") in done.stdout.replace("\n", "")
    # Fresh gates are uniform: a third each in the UNet, a half each in the text encoder, which mug leaves alone.
    assert "0.33" in done.stdout
    assert "–" in done.stdout
    assert "0.50" in done.stdout


@pytest.mark.usefixtures("tiny_toybox")
def test_pictures_of_a_demo_are_kept(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def a_file_takes_the_place(name: str) -> list[Image.Image]:
        out.write_text("mine")
        return [picture(world / "pictures" / f"{name}.png")]

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(toybox, "references", a_file_takes_the_place)
    done = mole("demo", "--out", out, "--steps", 1, "--device", "cpu")
    assert done.exit_code == 2, done.output
    kept = Path(done.stderr.split("lies in ")[1].strip().rstrip("."))
    assert sorted(file.name for file in kept.iterdir()) == ["first.png", "gates.png", "sheet.png"]


@pytest.mark.usefixtures("tiny_toybox")
def test_the_toybox_is_a_base_by_its_name(world: Path, tmp_path: Path) -> None:
    arguments = drawing(world, tmp_path / "it.png")
    arguments[arguments.index("--base") + 1] = "toybox"
    done = mole(*arguments)
    assert done.exit_code == 0, done.output
