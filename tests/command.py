"""What tests of commands share: a command run in this process, and a picture read whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from typer.testing import CliRunner

from mole_diffusion.cli import app


def picture(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.copy()


def mole(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
