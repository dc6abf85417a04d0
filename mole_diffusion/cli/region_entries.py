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
    region: Any = tuple(float(number) for number in text.split(",")) if numbers else _painted(name, text)
    from mole_diffusion.drawing.painted import as_text
    from mole_diffusion.region_forms import region_mask

    # Where the size of the picture is the base's, which nobody knows yet, it is taken to be large enough for the box.
    right, bottom = (math.ceil(max(region[i::2], default=1)) for i in (0, 1)) if numbers else (1, 1)
    size = height or max(bottom, 1), width or max(right, 1)
    try:
        region_mask(region, name, size, (64, 64))
    except MoLEError as error:
        raise MoLEError(f"--region {name}={printable(text)}: {error}") from None
    return region if numbers else as_text(region)


def _painted(name: str, text: str) -> Any:
    from mole_diffusion.drawing.painted import as_mask, is_painted
    from mole_diffusion.pictures import read_painted

    if is_painted(text):  # as the command line of a picture from `mole app` has it
        return as_mask(text)
    file = Path(text).expanduser()
    if not file.is_file():
        raise MoLEError(
            f"--region {name}={text}: neither a box LEFT,TOP,RIGHT,BOTTOM in fractions of the picture or pixels, "
            "nor a file. Example: --region cat=0,0,0.5,1 or --region cat=mask.png"
        )
    try:
        return read_painted(file)
    except MoLEError as error:
        raise MoLEError(f"--region {name}={text}: {error}") from None
