"""The forms in which a region of the picture may be given: a box, a polygon, a painted mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mole_diffusion.errors import MoLEError
from mole_diffusion.pictures import deep_grey

Box: TypeAlias = tuple[float, float, float, float]
Point: TypeAlias = tuple[float, float]
Region: TypeAlias = Box | Sequence[Point] | Image.Image | np.ndarray | Tensor
"""A box `(left, top, right, bottom)`, a polygon of three or more points `(x, y)`, or a painted mask."""

FORMS = (
    "a box (left, top, right, bottom), a polygon [(x, y), …] of at least three points, or a mask "
    "(PIL image, array or tensor of shape (height, width)); or a list of them"
)
SMALLEST = 2.0  # pixels; less is a slip of the units


def region_mask(
    region: Region | Sequence[Region], name: str, image_size: tuple[int, int], canvas: tuple[int, int]
) -> Tensor:
    """Draws one LoRA's region, or the union of several.

    Args:
        region: One region or a list of them. Numbers of a box or polygon are fractions of the picture if all of them
            lie in [0, 1], else pixels. What lies outside the picture is cut off. A PIL mask counts by its alpha
            where that varies, else by its luminance; arrays are bool, uint8 (255 is full) or float in [0, 1].
        name: Whose region it is, for messages.
        image_size: Height and width of the picture in pixels.
        canvas: Height and width of the result; a point is inside by its centre.

    Returns:
        float32, `canvas`, in [0, 1].

    Raises:
        MoLEError: The region has no known form, is empty, reversed, outside the picture or not finite.
    """
    several = isinstance(region, list | tuple) and not _is_numbers(region) and not _is_polygon(region)
    parts = list(region) if several else [region]  # type: ignore[arg-type]
    if not parts:
        raise MoLEError(f"the region of {name!r} is an empty list. Give {FORMS}, or leave {name!r} out.")
    planes = [_draw_one(part, f"the region of {name!r}", image_size, canvas) for part in parts]
    return torch.stack(planes).amax(dim=0)


def _draw_one(region: Any, whose: str, image_size: tuple[int, int], canvas: tuple[int, int]) -> Tensor:
    if isinstance(region, Image.Image):
        return _fitted(_painted(region, whose), whose, canvas)
    if isinstance(region, np.ndarray | Tensor):
        return _fitted(_array(region, whose), whose, canvas)
    if _is_numbers(region):
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
    elif _is_polygon(region):
        points = [(x, y) for x, y in region]
        _check_finite([number for point in points for number in point], whose, region)
        if len(points) < 3:
            raise MoLEError(f"{whose} is a polygon of {len(points)} points. Give at least three, or {FORMS}.")
    else:
        raise MoLEError(f"{whose} is {_short(region)}. Give {FORMS}.")
    return _inside(points, whose, region, image_size, canvas)


def _inside(
    points: list[Point], whose: str, given: Any, image_size: tuple[int, int], canvas: tuple[int, int]
) -> Tensor:
    """1 where the centre of a canvas point lies in the polygon (even-odd rule), else 0."""
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
    return torch.from_numpy(inside).float()


def luminance(image: Image.Image) -> np.ndarray:
    """How bright each pixel is, in [0, 1], `(h, w)`; of any mode, 16 bits included.

    Raises:
        MoLEError: Nobody says which of its numbers is white.
    """
    if image.mode.startswith("I"):
        return deep_grey(image).astype(np.float32)
    return np.asarray(image.convert("RGB").convert("L"), dtype=np.float32) / 255


def transparency(image: Image.Image) -> np.ndarray:
    """Alpha of each pixel, in [0, 1], `(h, w)`; 1 where the picture has none."""
    if not image.has_transparency_data or image.mode.startswith("I"):
        return np.ones((image.height, image.width), dtype=np.float32)
    return np.asarray(image.convert("RGBA").getchannel("A"), dtype=np.float32) / 255


def _painted(image: Image.Image, whose: str) -> Tensor:
    """Alpha of a picture that is transparent somewhere, else its luminance."""
    if image.mode == "F":
        return _array(np.asarray(image), whose)
    alpha = transparency(image)
    # An alpha that is full everywhere says nothing: some paint programs add one to every picture.
    try:
        shares = alpha if alpha.min() < 1 else luminance(image)
    except MoLEError as error:
        raise MoLEError(f"{whose} is a picture that cannot be read: {error}") from None
    return _array(shares, whose)


def _array(mask: np.ndarray | Tensor, whose: str) -> Tensor:
    if isinstance(mask, np.ndarray) and mask.dtype.kind not in "biuf":
        raise MoLEError(f"{whose} is an array of type {mask.dtype}. Give bool, uint8 (255 is full) or float in [0, 1].")
    array = mask.detach().cpu() if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))
    if array.ndim != 2 or 0 in array.shape:
        raise MoLEError(
            f"{whose} is an array of shape {tuple(array.shape)}. Give a mask of shape (height, width); a picture in "
            "colour as a PIL image; a polygon as a list of points."
        )
    if array.dtype == torch.bool:
        return array.float()
    if array.dtype == torch.uint8:
        if array.max() == 1:
            raise MoLEError(
                f"{whose} is a mask of type uint8 with nothing above 1, where 255 is full. "
                "Give it as bool, or times 255."
            )
        return array.float() / 255
    if not array.is_floating_point():
        raise MoLEError(f"{whose} is a mask of type {array.dtype}. Give bool, uint8 (255 is full) or float in [0, 1].")
    if not array.isfinite().all() or array.min() < 0 or array.max() > 1:
        raise MoLEError(
            f"{whose} is a mask with values from {array.min():g} to {array.max():g}. "
            "Give finite values in [0, 1], or uint8 (255 is full)."
        )
    return array.float()


def _fitted(mask: Tensor, whose: str, canvas: tuple[int, int]) -> Tensor:
    if not mask.any():
        raise MoLEError(
            f"{whose} is a mask that is empty (zero everywhere). Paint where {whose.removeprefix('the region of ')} "
            "belongs in white, or leave it out."
        )
    return F.interpolate(mask[None, None], size=canvas, mode="area")[0, 0]


def _check_finite(numbers: Sequence[float], whose: str, given: Any) -> None:
    if not all(math.isfinite(number) for number in numbers):
        raise MoLEError(f"{whose} has a number that is not finite: {_short(given)}. Give fractions or pixels.")


def _is_numbers(region: Any) -> bool:
    return isinstance(region, list | tuple) and len(region) > 0 and all(isinstance(number, Real) for number in region)


def _is_polygon(region: Any) -> bool:
    several = isinstance(region, list | tuple) and len(region) > 0
    return several and all(_is_numbers(point) and len(point) == 2 for point in region)


def _short(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 80 else text[:77] + "…"
