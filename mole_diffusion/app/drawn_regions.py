"""What was boxed or painted on the page's canvas, as regions, and masks as what the canvas shows."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ..composition import RegionMap
from ..drawing.painted import PREFIX, as_mask, as_text
from ..drawing.settings import PictureSettings, SavedRegion
from ..errors import MoLEError
from ..reading import parse_json
from .coloured import css_colour

LONGEST = 8_000_000  # characters
MOST_BOXES = 50  # of a LoRA
SMALLEST = 0.01  # side of a box, as a part of the picture; less is a slip of the mouse


def read(text: str, names: Sequence[str]) -> dict[str, list[SavedRegion]]:
    """Regions by LoRA, as settings take them.

    Args:
        text: `{"boxes": {name: [[l, t, r, b], …]}, "painted": {name: data URL}}`, fractions of the picture.
        names: LoRAs that are on; what was drawn for others rests.

    Raises:
        MoLEError: It is nothing that the canvas writes.
    """
    if not text.strip():
        return {}
    if len(text) > LONGEST:
        raise MoLEError(f"the regions are larger than {LONGEST:,} characters. Paint them again, more coarsely.")
    try:
        given = parse_json(text)
        boxes, painted = given.get("boxes") or {}, given.get("painted") or {}
        regions = {name: [_box(box) for box in boxes.get(name, [])] for name in names}
        masks = {name: painted[name] for name in names if name in painted}
    except MoLEError as error:
        raise MoLEError(f"the regions of the page: {error}. Clear them, and draw them again.") from None
    except (AttributeError, TypeError, ValueError):
        raise MoLEError("the regions of the page cannot be read. Clear them, and draw them again.") from None
    found: dict[str, list[SavedRegion]] = {
        name: [box for box in own if box[2] - box[0] >= SMALLEST and box[3] - box[1] >= SMALLEST]
        for name, own in regions.items()
    }
    for name, boxes in found.items():
        if len(boxes) > MOST_BOXES:
            raise MoLEError(f"{name} has {len(boxes):,} boxes; {MOST_BOXES} are the most. Paint its region instead.")
    for name, mask in masks.items():
        if as_mask(mask).getextrema() != (0, 0):
            found[name].append(as_text(as_mask(mask)))
    return {name: parts for name, parts in found.items() if parts}


def show(
    names: Sequence[str],
    settings: PictureSettings | None = None,
    masks: RegionMap | None = None,
    picture: Image.Image | None = None,
) -> str:
    """What the canvas is to show: names with their colours, the regions of settings or of a call's masks, a picture."""
    shown: dict[str, Any] = {
        "names": list(names),
        "colours": [css_colour(index) for index in range(len(names))],
    }
    if settings is not None:
        shown["boxes"] = {
            name: [list(part) for part in parts if not isinstance(part, str)]
            for name, parts in settings.regions.items()
        }
        shown["painted"] = {
            name: next(part for part in parts if isinstance(part, str))
            for name, parts in settings.regions.items()
            if any(isinstance(part, str) for part in parts)
        }
    if masks is not None:
        shown["boxes"], shown["painted"] = {}, masks_as_text(masks)
    if picture is not None:
        file = io.BytesIO()
        picture.convert("RGB").save(file, "png")
        shown["picture"] = PREFIX + base64.b64encode(file.getvalue()).decode("ascii")
    return json.dumps(shown)


def masks_as_text(masks: RegionMap) -> Mapping[str, str]:
    """The masks of the first picture, those that are not empty."""
    first = {name: images[0] for name, images in masks.images((128, 128)).items()}
    return {name: as_text(image) for name, image in first.items() if image.getextrema() != (0, 0)}


def _box(box: Any) -> tuple[float, float, float, float]:
    left, top, right, bottom = (min(max(float(number), 0.0), 1.0) for number in box)
    return round(left, 4), round(top, 4), round(right, 4), round(bottom, 4)
