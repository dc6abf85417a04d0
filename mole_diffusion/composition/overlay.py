"""Drawing regions over a picture: a colour for each LoRA, and a legend below."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (240, 228, 66), (0, 114, 178), (213, 94, 0)]
INK, PAPER = (28, 28, 32), (255, 255, 255)
SMALLEST = 256  # pixels: below this no legend can be read, and the picture is enlarged by a whole factor
TINT = 0.5


def overlay(picture: Image.Image, planes: Tensor, names: Sequence[str]) -> Image.Image:
    """`picture` with each LoRA's region tinted and outlined in a colour of its own, and a legend of names below.

    Args:
        picture: A picture of any size; a small one is enlarged by a whole factor.
        planes: `(N, h, w)` in [0, 1].
        names: The N names.
    """
    factor = max(1, -(-SMALLEST // min(picture.size)))
    width, height = picture.width * factor, picture.height * factor
    canvas = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST), dtype=np.float32)
    smooth = F.interpolate(planes[None].float().cpu(), size=(height, width), mode="bilinear", align_corners=False)[0]
    shares = smooth.numpy()
    colours = [colour_of(index) for index in range(len(names))]
    # Outside every region the picture fades a little, so that the tints stand out whatever its own colours are.
    owned = shares.sum(axis=0).clip(0, 1)[..., None]
    grey = canvas.mean(axis=-1, keepdims=True)
    canvas = owned * canvas + (1 - owned) * (0.5 * canvas + 0.3 * grey + 0.2 * 255)
    tint = sum((share[..., None] * np.asarray(colour) for share, colour in zip(shares, colours, strict=True)), 0.0)
    canvas = canvas * (1 - TINT * owned) + TINT * tint
    line = max(1, min(width, height) // 256)
    for share, colour in zip(shares, colours, strict=True):
        canvas[_outline(share, line)] = colour
    tinted = Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8))
    return _with_legend(tinted, names, colours)


def colour_of(index: int) -> tuple[int, int, int]:
    """The colour of the LoRA at this place of the list, red, green and blue."""
    if index < len(COLOURS):
        return COLOURS[index]
    red, green, blue = colorsys.hsv_to_rgb(0.618034 * index % 1, 0.7, 0.85)  # the golden ratio never repeats a hue
    return round(255 * red), round(255 * green), round(255 * blue)


def _outline(share: np.ndarray, line: int) -> np.ndarray:
    """The `line` pixels inside the edge where a region falls below half of its own maximum."""
    inside = share > 0.5 * max(float(share.max()), 1e-6)
    within = np.pad(inside, line, mode="edge")
    core = inside.copy()
    for down, right in ((0, line), (2 * line, line), (line, 0), (line, 2 * line)):
        core &= within[down : down + inside.shape[0], right : right + inside.shape[1]]
    return inside & ~core


def _with_legend(picture: Image.Image, names: Sequence[str], colours: Sequence[tuple[int, int, int]]) -> Image.Image:
    size = max(13, picture.width // 32)
    font = ImageFont.load_default(size)
    gap, height = size // 2, round(size * 1.7)
    places, x, line = [], gap, 0
    for name in names:
        name = _shortened(name, font, picture.width - 4 * gap - size)
        needed = size + gap + round(font.getlength(name))
        if x > gap and x + needed + gap > picture.width:
            x, line = gap, line + 1
        places.append((x, line * height, name))
        x += needed + 2 * gap
    sheet = Image.new("RGB", (picture.width, picture.height + (line + 1) * height), PAPER)
    sheet.paste(picture, (0, 0))
    pen = ImageDraw.Draw(sheet)
    for (left, top, name), colour in zip(places, colours, strict=True):
        middle = picture.height + top + height // 2
        square = (left, middle - size // 2, left + size, middle + (size + 1) // 2)
        pen.rounded_rectangle(square, radius=size // 5, fill=colour)
        pen.text((left + size + gap, middle), name, fill=INK, font=font, anchor="lm")
    return sheet


def _shortened(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    if font.getlength(name) <= width:
        return name
    while len(name) > 1 and font.getlength(name + "…") > width:
        name = name[:-1]
    return name + "…"
