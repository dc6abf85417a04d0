"""PNG files that tell how the picture was made: settings, Python call and command line in their text chunks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MoLEError, printable
from ..files import atomic_path
from ..reading import parse_json, regular_size
from .as_command import as_command
from .as_python import as_python
from .settings import PictureSettings

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 2**26  # a small file can hold more, all of one colour, which would fill the memory
SETTINGS, PYTHON, COMMAND = "mole_diffusion.settings", "mole_diffusion.python", "mole_diffusion.command"


def save(picture: Image.Image, file: str | os.PathLike[str], settings: PictureSettings) -> Path:
    """Writes a picture. A PNG tells how it was made; other formats have no place for that."""
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_itxt(SETTINGS, json.dumps(settings.to_dict(), ensure_ascii=False, allow_nan=False))
    texts.add_itxt(PYTHON, as_python(settings))
    texts.add_itxt(COMMAND, as_command(settings))
    target = Path(file)
    with atomic_path(target) as temporary:
        if target.suffix.lower() == ".png":
            picture.save(temporary, pnginfo=texts)
        else:
            picture.save(temporary)
    return target


def read_settings(file: str | os.PathLike[str]) -> PictureSettings:
    """What a picture was made from.

    Raises:
        MoLEError: It is no PNG, none of ours, or what it tells is damaged.
    """
    from PIL import Image

    name = printable(Path(file).name)
    try:
        regular_size(file)
    except MoLEError as error:
        raise MoLEError(f"{name}: {error}. Give a PNG that `mole` wrote.") from None
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise MoLEError(f"{name} has {picture.width} x {picture.height} pixels; {MOST_PIXELS:,} are the most.")
            picture.load()
            text = getattr(picture, "text", {}).get(SETTINGS)
    except MoLEError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MoLEError(f"{name} is no PNG that can be read ({error}). Give one that `mole` wrote.") from None
    if text is None:
        raise MoLEError(
            f"{name} does not tell how it was made. Give a PNG as `mole generate` or `mole app` wrote it: other "
            "programs leave these texts out when they save a picture again."
        )
    try:
        return PictureSettings.from_dict(parse_json(text))
    except MoLEError as error:
        raise MoLEError(f"{name}: what it tells of how it was made cannot be used: {error}") from None
