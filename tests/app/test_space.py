"""Gates become a model with its card and a Space, which begins with them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from mole_diffusion import __version__, toybox
from mole_diffusion.app.session import Session
from mole_diffusion.app.space import write_space
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


def test_what_is_no_space_is_told(tmp_path: Path) -> None:
    loras = tuple(LoRASettings(name, f"toybox:{name}") for name in NAMES)
    gates = str(toybox.gates_dir("+".join(NAMES)))
    good = PictureSettings("a cat", loras=loras, gates=gates)
    for settings, message in (
        (PictureSettings("a cat", loras=loras, gates=str(tmp_path)), "has no config.json"),
        (PictureSettings("a cat", loras=loras[::-1], gates=gates), "these gates are for cat, boot, teapot"),
        (PictureSettings("a cat", loras=loras, gates=gates, base=str(tmp_path)), "no Hub id"),
    ):
        with pytest.raises(MoLEError, match=message):
            write_space(settings, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(MoLEError, match="is not empty"):
        write_space(good, tmp_path / "out")
