"""Regions given by numbers, boxes and polygons: what is inside of them. Known before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from mole_diffusion.errors import MoLEError

FORMS = (
    "a box (left, top, right, bottom), a polygon [(x, y), …] of at least three points, or a mask "
    "(PIL image, array or tensor of shape (height, width)); or a list of them"
)
SMALLEST = 2.0  # pixels; less is a slip of the units


def outlined(region: Any, whose: str, image_size: tuple[int, int], canvas: tuple[int, int]) -> np.ndarray:
    """Whether the centre of each point of a canvas lies in a box or polygon, `canvas`.

    Args:
        region: The box or polygon, as in `region_forms.region_mask`.
        whose: Whose it is, for messages: "the region of 'cat'".
        image_size: Height and width of the picture in pixels.
        canvas: Height and width of the result.

    Raises:
        MoLEError: It is neither, or empty, reversed, outside the picture or not finite.
    """
    if is_numbers(region):
        if len(region) != 4:
            raise MoLEError(f"{whose} has {len(region)} numbers, {tuple(region)}. Give {FORMS}.")
        left, top, right, bottom = region
        _check_finite(region, whose, region)
        if left >= right or top >= bottom:
            raise MoLEError(
                f"{whose} is the box {tuple(region)}, which is empty or reversed. Give (left, top, right, bottom) "
                "with left < right and top < bottom."
            )
        points = [(left, top), (right, top), (right, bottom), (left, bottom)]
    elif is_polygon(region):
        points = [(x, y) for x, y in region]
        _check_finite([number for point in points for number in point], whose, region)
        if len(points) < 3:
            raise MoLEError(f"{whose} is a polygon of {len(points)} points. Give at least three, or {FORMS}.")
    else:
        raise MoLEError(f"{whose} is {_short(region)}. Give {FORMS}.")
    return _inside(points, whose, region, image_size, canvas)


def _inside(
    points: list[tuple[float, float]], whose: str, given: Any, image_size: tuple[int, int], canvas: tuple[int, int]
) -> np.ndarray:
    """Whether the centre of a canvas point lies in the polygon (even-odd rule)."""
    height, width = image_size
    corners = np.asarray(points, dtype=np.float64)
    if not (corners.min() >= 0 and corners.max() <= 1):
        if min(np.ptp(corners, axis=0)) < SMALLEST:
            raise MoLEError(
                f"{whose}, {_short(given)}, is read as pixels, as not all its numbers lie in [0, 1], and would be "
                f"less than {SMALLEST:g} pixels high or wide. Give fractions from 0 to 1, or pixels of the picture "
                f"({width} x {height})."
            )
        corners = corners / (width, height)
    rows, columns = canvas
    x, y = np.meshgrid((np.arange(columns) + 0.5) / columns, (np.arange(rows) + 0.5) / rows)
    inside = np.zeros((rows, columns), dtype=bool)
    # Even-odd rule: a ray from the point to the right crosses the outline an odd number of times.
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    if not inside.any():
        raise MoLEError(
            f"{whose}, {_short(given)}, covers nothing of the picture of {width} x {height} pixels: it lies outside "
            "or has no area. Give fractions from 0 to 1, or pixels inside the picture."
        )
    return inside


def _check_finite(numbers: Sequence[float], whose: str, given: Any) -> None:
    if not all(math.isfinite(number) for number in numbers):
        raise MoLEError(f"{whose} has a number that is not finite: {_short(given)}. Give fractions or pixels.")


def is_numbers(region: Any) -> bool:
    """Whether it is a row of numbers, as a box is."""
    return isinstance(region, list | tuple) and len(region) > 0 and all(isinstance(number, Real) for number in region)


def is_polygon(region: Any) -> bool:
    """Whether it is a row of points."""
    several = isinstance(region, list | tuple) and len(region) > 0
    return several and all(is_numbers(point) and len(point) == 2 for point in region)


def _short(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 80 else text[:77] + "…"
