"""What tests of commands share: a command run in this process, and a picture read whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from typer.testing import CliRunner

from mole_diffusion.cli import app
from tests.composing import NAMES

PROMPT = "a cat, a dog and a mug"


def picture(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.copy()


def mole(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def drawing(world: Path, out: Path, *more: object) -> list[object]:
    """A call of `mole generate` in the world of `conftest.py`."""
    loras = [part for name in NAMES for part in ("--lora", f"{name}={world / name}.safetensors")]
    options = ["--base", world / "base", *loras, "--prompt", PROMPT, "--steps", 2, "--device", "cpu", "--out", out]
    return ["generate", *options, *more]
