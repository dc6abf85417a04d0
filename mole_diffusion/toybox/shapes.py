"""The sixteen object classes of the toybox, drawn from circles and polygons.

An object is a map of three inks: a dark outline, a primary and a secondary colour. Which pixel takes which ink depends
on the class, the pattern and the size alone, so a look (two colours, one pattern) can be put on any class, and the
oracle can ask of any pixel what colour it should have.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

from mole_diffusion.errors import MoLEError

PATTERNS = ("plain", "striped", "dotted")
OUTLINE, PRIMARY, SECONDARY = 1, 2, 3
_SUPERSAMPLING = 8
_OUTLINE_WIDTH = 0.075  # of the object's size


class _Pen:
    """Draws outlined shapes on a label map; coordinates run from 0 to 1."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.image = Image.new("L", (size, size), 0)
        self.draw = ImageDraw.Draw(self.image)
        self.width = max(1, round(_OUTLINE_WIDTH * size))

    def _points(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x * (self.size - 1), y * (self.size - 1)) for x, y in points]

    def polygon(self, points: list[tuple[float, float]], label: int) -> None:
        outline = self._points(points)
        self.draw.polygon(outline, fill=label)
        self.draw.line([*outline, outline[0], outline[1]], fill=OUTLINE, width=self.width, joint="curve")

    def box(self, x0: float, y0: float, x1: float, y1: float, label: int) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], label)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, label: int) -> None:
        (ax, ay), (bx, by) = self._points([(x0, y0), (x1, y1)])
        half = self.width / 2
        self.draw.ellipse((ax - half, ay - half, bx + half, by + half), fill=label, outline=OUTLINE, width=self.width)

    def half_disc(self, x0: float, y0: float, x1: float, y1: float, label: int) -> None:
        """The upper half of an ellipse."""
        cx, cy, rx, ry = (x0 + x1) / 2, y1, (x1 - x0) / 2, y1 - y0
        self.polygon([(cx - rx * cos(pi * k / 24), cy - ry * sin(pi * k / 24)) for k in range(25)], label)

    def ring(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """A handle: an outlined band that shows what lies behind it in the middle."""
        (ax, ay), (bx, by) = self._points([(x0, y0), (x1, y1)])
        self.draw.ellipse((ax, ay, bx, by), outline=OUTLINE, width=2 * self.width)

    def line(self, points: list[tuple[float, float]], width: float = 1.0) -> None:
        self.draw.line(self._points(points), fill=OUTLINE, width=round(width * self.width), joint="curve")

    def dot(self, x: float, y: float, radius: float) -> None:
        (cx, cy), r = self._points([(x, y)])[0], radius * self.size
        self.draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=OUTLINE)


def _mug(p: _Pen) -> None:
    p.ring(0.56, 0.28, 0.97, 0.74)
    p.polygon([(0.06, 0.1), (0.72, 0.1), (0.68, 0.95), (0.1, 0.95)], PRIMARY)
    p.polygon([(0.06, 0.1), (0.72, 0.1), (0.71, 0.3), (0.07, 0.3)], SECONDARY)


def _house(p: _Pen) -> None:
    p.box(0.14, 0.42, 0.86, 0.95, PRIMARY)
    p.polygon([(0.04, 0.45), (0.5, 0.04), (0.96, 0.45)], SECONDARY)
    p.draw.rectangle([*p._points([(0.41, 0.64)])[0], *p._points([(0.59, 0.95)])[0]], fill=OUTLINE)


def _tree(p: _Pen) -> None:
    p.box(0.4, 0.7, 0.6, 0.96, SECONDARY)
    p.polygon(
        [(0.5, 0.03), (0.74, 0.34), (0.62, 0.34), (0.92, 0.74), (0.08, 0.74), (0.38, 0.34), (0.26, 0.34)], PRIMARY
    )


def _fish(p: _Pen) -> None:
    p.polygon([(0.66, 0.5), (0.97, 0.18), (0.97, 0.82)], SECONDARY)
    p.ellipse(0.04, 0.22, 0.78, 0.78, PRIMARY)
    p.dot(0.22, 0.43, 0.06)


def _star(p: _Pen) -> None:
    radii = [0.5 if k % 2 == 0 else 0.23 for k in range(10)]
    p.polygon([(0.5 + r * sin(pi * k / 5), 0.54 - r * cos(pi * k / 5)) for k, r in enumerate(radii)], PRIMARY)
    p.ellipse(0.37, 0.42, 0.63, 0.68, SECONDARY)


def _heart(p: _Pen) -> None:
    curve = [k * 2 * pi / 48 for k in range(48)]
    outline = [
        (0.5 + 0.47 * sin(t) ** 3, 0.46 - 0.029 * (13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)))
        for t in curve
    ]
    p.polygon(outline, PRIMARY)
    p.polygon([(0.5 + 0.5 * (x - 0.5), 0.47 + 0.5 * (y - 0.5)) for x, y in outline], SECONDARY)


def _boot(p: _Pen) -> None:
    p.polygon([(0.2, 0.05), (0.62, 0.05), (0.62, 0.48), (0.86, 0.54), (0.95, 0.68), (0.95, 0.8), (0.14, 0.8)], PRIMARY)
    p.box(0.12, 0.78, 0.95, 0.95, SECONDARY)


def _cat(p: _Pen) -> None:
    p.polygon([(0.08, 0.04), (0.46, 0.3), (0.1, 0.6)], PRIMARY)
    p.polygon([(0.92, 0.04), (0.54, 0.3), (0.9, 0.6)], PRIMARY)
    p.ellipse(0.08, 0.24, 0.92, 0.94, PRIMARY)
    p.ellipse(0.3, 0.6, 0.7, 0.9, SECONDARY)
    p.dot(0.32, 0.47, 0.065)
    p.dot(0.68, 0.47, 0.065)


def _robot(p: _Pen) -> None:
    p.line([(0.5, 0.08), (0.5, 0.3)])
    p.dot(0.5, 0.09, 0.08)
    p.box(0.03, 0.45, 0.2, 0.72, SECONDARY)
    p.box(0.8, 0.45, 0.97, 0.72, SECONDARY)
    p.box(0.14, 0.28, 0.86, 0.94, PRIMARY)
    p.box(0.26, 0.4, 0.74, 0.62, SECONDARY)
    p.dot(0.38, 0.51, 0.06)
    p.dot(0.62, 0.51, 0.06)
    p.line([(0.32, 0.79), (0.68, 0.79)])


def _clock(p: _Pen) -> None:
    p.ellipse(0.06, 0.04, 0.4, 0.34, SECONDARY)
    p.ellipse(0.6, 0.04, 0.94, 0.34, SECONDARY)
    p.line([(0.28, 0.82), (0.16, 0.97)], 1.6)
    p.line([(0.72, 0.82), (0.84, 0.97)], 1.6)
    p.ellipse(0.12, 0.16, 0.88, 0.92, PRIMARY)
    p.line([(0.5, 0.3), (0.5, 0.55), (0.68, 0.64)], 1.2)


def _teapot(p: _Pen) -> None:
    p.ring(0.68, 0.34, 0.99, 0.78)
    p.polygon([(0.02, 0.3), (0.16, 0.3), (0.34, 0.62), (0.22, 0.84)], SECONDARY)
    p.ellipse(0.16, 0.3, 0.82, 0.94, PRIMARY)
    p.half_disc(0.3, 0.14, 0.68, 0.36, SECONDARY)
    p.dot(0.49, 0.1, 0.07)


def _car(p: _Pen) -> None:
    p.polygon([(0.22, 0.48), (0.34, 0.18), (0.68, 0.18), (0.8, 0.48)], SECONDARY)
    p.polygon([(0.03, 0.46), (0.97, 0.46), (0.97, 0.78), (0.03, 0.78)], PRIMARY)
    for x in (0.26, 0.74):
        p.dot(x, 0.8, 0.14)


def _mushroom(p: _Pen) -> None:
    p.polygon([(0.36, 0.5), (0.64, 0.5), (0.7, 0.95), (0.3, 0.95)], SECONDARY)
    p.half_disc(0.04, 0.06, 0.96, 0.58, PRIMARY)


def _umbrella(p: _Pen) -> None:
    p.line([(0.5, 0.4), (0.5, 0.86), (0.56, 0.94), (0.66, 0.94), (0.7, 0.84)], 1.4)
    p.half_disc(0.03, 0.06, 0.97, 0.52, PRIMARY)
    p.polygon([(0.5, 0.06), (0.66, 0.52), (0.34, 0.52)], SECONDARY)


def _flower(p: _Pen) -> None:
    for k in range(5):
        x, y = 0.5 + 0.27 * sin(2 * pi * k / 5), 0.51 - 0.27 * cos(2 * pi * k / 5)
        p.ellipse(x - 0.2, y - 0.2, x + 0.2, y + 0.2, PRIMARY)
    p.ellipse(0.33, 0.34, 0.67, 0.68, SECONDARY)


def _boat(p: _Pen) -> None:
    p.polygon([(0.54, 0.05), (0.9, 0.58), (0.54, 0.58)], SECONDARY)
    p.polygon([(0.46, 0.14), (0.14, 0.58), (0.46, 0.58)], SECONDARY)
    p.polygon([(0.03, 0.62), (0.97, 0.62), (0.8, 0.95), (0.2, 0.95)], PRIMARY)


_DRAWINGS: dict[str, Callable[[_Pen], None]] = {
    "mug": _mug,
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "star": _star,
    "heart": _heart,
    "boot": _boot,
    "cat": _cat,
    "robot": _robot,
    "clock": _clock,
    "teapot": _teapot,
    "car": _car,
    "mushroom": _mushroom,
    "umbrella": _umbrella,
    "flower": _flower,
    "boat": _boat,
}
CLASSES = tuple(_DRAWINGS)


def _put_pattern(labels: np.ndarray, pattern: str) -> None:
    """Gives part of the primary area to the secondary colour."""
    y, x = np.mgrid[0 : labels.shape[0], 0 : labels.shape[1]] / labels.shape[0]
    if pattern == "plain":
        return
    if pattern == "striped":
        chosen = (y * 3.5 + 0.1) % 1 > 0.5
    elif pattern == "dotted":
        row = np.floor(y * 3.6)
        cx, cy = (x * 3.6 + 0.5 * (row % 2)) % 1 - 0.5, (y * 3.6) % 1 - 0.5
        chosen = cx**2 + cy**2 < 0.3**2
    else:
        raise MoLEError(f"pattern {pattern!r} is not one of {list(PATTERNS)}.")
    labels[(labels == PRIMARY) & chosen] = SECONDARY


@lru_cache(maxsize=4096)
def ink_masks(class_name: str, pattern: str, size: int) -> np.ndarray:
    """How much of each pixel of an object is outline, primary and secondary ink.

    Args:
        class_name: One of `CLASSES`.
        pattern: One of `PATTERNS`.
        size: Side of the square box around the object, in pixels.

    Returns:
        Shape `(3, size, size)`, float32 from 0 to 1; the sum over inks is the object's opacity. Read-only.
    """
    if class_name not in _DRAWINGS:
        raise MoLEError(f"class {class_name!r} is not one of {list(CLASSES)}.")
    pen = _Pen(size * _SUPERSAMPLING)
    _DRAWINGS[class_name](pen)
    labels = np.array(pen.image)
    _put_pattern(labels, pattern)
    blocks = labels.reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING)
    masks = np.stack([(blocks == ink).mean(axis=(1, 3)) for ink in (OUTLINE, PRIMARY, SECONDARY)])
    masks = masks.astype(np.float32)
    masks.setflags(write=False)
    return masks
