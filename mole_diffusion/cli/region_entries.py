"""Regions on the command line: boxes and painted pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.errors import MoLEError, printable

from .inputs import read_several
from .lora_entries import NUMBER, check_known

if TYPE_CHECKING:
    from mole_diffusion.drawing.settings import SavedRegion


def read_regions(
    entries: Sequence[str], names: Collection[str], height: int | None, width: int | None
) -> dict[str, tuple[SavedRegion, ...]] | None:
    """Where each LoRA belongs: boxes "cat=0,0,0.5,1" and painted pictures "cat=mask.png"; `None` without any.

    Args:
        entries: What was given, one text for each `--region`.
        names: The LoRAs.
        height: Height of the picture in pixels; `None` where the command line does not say.
        width: Width of the picture in pixels; `None` likewise.

    Raises:
        MoLEError: An entry is malformed, names no LoRA, is an empty or reversed box, or a file that is no picture.
    """
    regions = read_several("--region", entries, "cat=0,0,0.5,1")
    check_known("--region", regions, names)
    read = {name: tuple(_region(name, text, height, width) for text in texts) for name, texts in regions.items()}
    return read or None


def _region(name: str, text: str, height: int | None, width: int | None) -> SavedRegion:
    numbers = re.fullmatch(rf"\s*{NUMBER}\s*(?:,\s*{NUMBER}\s*)*", text)
    try:
        return _box(name, text, height, width) if numbers else _painted(name, text)
    except MoLEError as error:
        raise MoLEError(f"--region {name}={printable(text)}: {error}") from None


def _box(name: str, text: str, height: int | None, width: int | None) -> SavedRegion:
    from mole_diffusion.region_outlines import outlined

    box: Any = tuple(float(number) for number in text.split(","))
    # Where the size of the picture is the base's, which nobody knows yet, it is taken to be large enough for the box.
    right, bottom = (max(math.ceil(max(side, default=1)), 1) for side in (box[0::2], box[1::2]))
    outlined(box, f"the region of {name!r}", (height or bottom, width or right), (64, 64))
    return box


def _painted(name: str, text: str) -> str:
    from mole_diffusion.drawing.painted import as_mask, as_text, is_painted
    from mole_diffusion.pictures import read_painted

    file = Path(text).expanduser()
    if not (is_painted(text) or file.is_file()):
        raise MoLEError(
            "neither a box LEFT,TOP,RIGHT,BOTTOM in fractions of the picture or pixels, nor a file. "
            "Example: --region cat=0,0,0.5,1 or --region cat=mask.png"
        )
    # Text it is in the command line of a picture from `mole app`.
    mask = as_mask(text) if is_painted(text) else read_painted(file)
    from mole_diffusion.region_forms import region_mask

    region_mask(mask, name, (1, 1), (64, 64))
    return as_text(mask)
