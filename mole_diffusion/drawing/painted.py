"""Painted masks as text, so that they travel with the settings of a picture: a PNG in shades of grey, as a data URL."""

from __future__ import annotations

import base64
import binascii
import io
from typing import TYPE_CHECKING

from ..errors import MoLEError

if TYPE_CHECKING:
    from PIL import Image

PREFIX = "data:image/png;base64,"
LONGEST = 4_000_000  # characters
MOST_PIXELS = 2**25  # a few bytes can stand for many more, which would fill the memory


def is_painted(text: str) -> bool:
    """Whether `text` is meant to be a painted mask."""
    return text.startswith(PREFIX)


def as_text(mask: Image.Image) -> str:
    """A mask as text: its alpha where that varies, else its luminance, in 8 bits."""
    from PIL import Image

    from ..region_forms import luminance, transparency

    alpha = transparency(mask)
    shares = alpha if alpha.min() < 1 else luminance(mask)
    file = io.BytesIO()
    Image.fromarray((shares * 255).round().clip(0, 255).astype("uint8")).save(file, "png", optimize=True)
    return PREFIX + base64.b64encode(file.getvalue()).decode("ascii")


def as_mask(text: str) -> Image.Image:
    """The mask that `as_text` wrote, or a browser's canvas, in shades of grey.

    Raises:
        MoLEError: It is cut, damaged, no PNG or too large.
    """
    from PIL import Image

    if not is_painted(text) or len(text) > LONGEST:
        raise MoLEError(f"a painted mask must be {PREFIX}… of at most {LONGEST:,} characters.")
    try:
        data = base64.b64decode(text.removeprefix(PREFIX), validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise MoLEError(
                    f"a painted mask of {picture.width} x {picture.height} pixels is too large; {MOST_PIXELS:,} pixels "
                    "are the most. Make it smaller: it is stretched over the picture."
                )
            picture.load()
            # A canvas paints in colours on nothing: what counts is how opaque it is.
            return picture.getchannel("A") if "A" in picture.getbands() else picture.convert("L")
    except MoLEError:
        raise
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MoLEError(f"a painted mask is no PNG that can be read ({error}). Paint it again.") from None
