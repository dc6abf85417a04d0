"""Gates become a model with its card and a Space, which begins with them."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mole_diffusion import __version__, toybox
from mole_diffusion.app.session import Session
from mole_diffusion.app.space import write_space
from mole_diffusion.app.studio import FinishedPicture
from mole_diffusion.drawing import png
from mole_diffusion.drawing.settings import LoRASettings, PictureSettings
from mole_diffusion.errors import MoLEError
from mole_diffusion.gating import MoLEModel
from tests.command import mole

NAMES = ("cat", "boot", "teapot")


def test_a_space_is_whole_and_begins_with_its_gates(tmp_path: Path) -> None:
    out = tmp_path / "space"
    loras = [part for name in NAMES for part in ("--lora", name)]
    prompt = "a <v1> cat, a <v2> boot and a <v3> teapot"
    done = mole("space", "--gates", toybox.gates_dir("+".join(NAMES)), *loras, "--prompt", prompt, "--out", out)
    assert done.exit_code == 0, done.output
    assert (out / "requirements.txt").read_text() == f"mole-diffusion[app]=={__version__}\n"
    assert (out / "README.md").read_text().startswith('---\ntitle: "cat + boot + teapot"\nsdk: gradio\n')
    assert [lora["name"] for lora in MoLEModel.load_config(out / "model")["loras"]] == list(NAMES)
    begin = runpy.run_path(str(out / "app.py"))["begin"]
    assert begin.gates == str(out / "model")
    session = Session()
    session.take(begin.loras)
    assert [row.line[0] for row in session.rows] == ["✓"] * 3
    assert session.loras[0].triggers == ("<v1> cat",)
    assert str(tmp_path) not in json.dumps([path.read_text() for path in out.glob("*.*")])


def test_numbers_that_its_page_would_not_take(tmp_path: Path) -> None:
    for option, value in (("--guidance-scale", "inf"), ("--guidance-scale", "1e300"), ("--steps", "99999999999")):
        done = mole("space", "--lora", "cat", "--prompt", "a <v1> cat", option, value, "--out", tmp_path / "space")
        assert done.exit_code == 2, done.output
        assert option.strip("-").replace("-", "_") in done.output
        assert not (tmp_path / "space").exists()


def test_gates_that_are_damaged_make_no_space(tmp_path: Path) -> None:
    gates = tmp_path / "gates"
    shutil.copytree(toybox.gates_dir("+".join(NAMES)), gates)
    for damaged in ("{}", "[]", '{"_class_name": "MoLEModel", "loras": 3}'):
        (gates / "config.json").write_text(damaged)
        with pytest.raises(MoLEError, match=r"config\.json"):
            write_space(
                PictureSettings("a", gates=str(gates), loras=(LoRASettings("cat", "toybox:cat"),)), tmp_path / "s"
            )


def test_a_run_of_the_page_becomes_a_space(tmp_path: Path) -> None:
    file = tmp_path / "kitty.safetensors"
    file.write_bytes(toybox.lora_path("cat").read_bytes())
    session = Session()
    with pytest.raises(MoLEError, match="no picture yet"):
        session.space(tmp_path / "none")
    session.drop([str(file)])
    settings = PictureSettings(
        "a <v1> cat", loras=tuple(session.loras), composition="masks", regions={"kitty": ((0.0, 0.0, 0.5, 1.0),)}
    )
    session.drawn.append(FinishedPicture(Image.new("RGB", (64, 64)), settings))
    png.save(session.drawn[0].picture, tmp_path / "it.png", settings)
    with_button = session.space(tmp_path / "with-button")
    file.rename(tmp_path / "moved.safetensors")
    lost = mole("space", "--picture", tmp_path / "it.png", "--out", tmp_path / "lost")
    assert lost.exit_code == 2
    assert "kitty.safetensors" in lost.output
    moved = f"kitty={tmp_path / 'moved.safetensors'}"
    done = mole("space", "--picture", tmp_path / "it.png", "--lora", moved, "--out", tmp_path / "by-command")
    assert done.exit_code == 0, done.output
    for out in (with_button, tmp_path / "by-command"):
        begin = runpy.run_path(str(out / "app.py"))["begin"]
        assert (begin.composition, begin.regions, begin.gates) == ("masks", settings.regions, None)
        assert Path(begin.loras[0].file).read_bytes() == (tmp_path / "moved.safetensors").read_bytes()
        card = (out / "model" / "README.md").read_text()
        assert "{'kitty': 'loras/1-kitty.safetensors'}" in card
        assert str(tmp_path) not in card


def test_a_space_of_a_picture_is_of_its_own_loras(tmp_path: Path) -> None:
    settings = PictureSettings("a <v1> cat", loras=(LoRASettings("cat", "toybox:cat", sha256="0" * 64),))
    png.save(Image.new("RGB", (64, 64)), tmp_path / "it.png", settings)
    for options, message in (
        ((), "is another file than the one that cat was drawn with"),
        (("--lora", "boot"), "was drawn without such a LoRA; it has cat"),
        (("--steps", 3), "--steps is told by --picture it.png"),
    ):
        done = mole("space", "--picture", tmp_path / "it.png", *options, "--out", tmp_path / "out")
        assert done.exit_code == 2
        assert message in done.output
    done = mole("space", "--lora", "cat", "--out", tmp_path / "out")
    assert "--prompt is missing" in done.output
    assert not (tmp_path / "out").exists()


def test_what_is_no_space_is_told(tmp_path: Path) -> None:
    loras = tuple(LoRASettings(name, f"toybox:{name}") for name in NAMES)
    gates = str(toybox.gates_dir("+".join(NAMES)))
    good = PictureSettings("a cat", loras=loras, gates=gates)
    for settings, message in (
        (PictureSettings("a cat", loras=loras, gates=str(tmp_path)), "has no config.json"),
        (PictureSettings("a cat"), "needs LoRAs"),
        (PictureSettings("a cat", loras=loras[::-1], gates=gates), "these gates are for cat, boot, teapot"),
        (PictureSettings("a cat", loras=loras, gates=gates, base=str(tmp_path)), "no Hub id"),
    ):
        with pytest.raises(MoLEError, match=message):
            write_space(settings, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(MoLEError, match="is not empty"):
        write_space(good, tmp_path / "out")
