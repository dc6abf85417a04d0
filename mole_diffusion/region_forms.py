"""The forms in which a region of the picture may be given: a box, a polygon, a painted mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mole_diffusion.errors import MoLEError
from mole_diffusion.pictures import deep_grey
from mole_diffusion.region_outlines import FORMS, is_numbers, is_polygon, outlined

Box: TypeAlias = tuple[float, float, float, float]
Point: TypeAlias = tuple[float, float]
Region: TypeAlias = Box | Sequence[Point] | Image.Image | np.ndarray | Tensor
"""A box `(left, top, right, bottom)`, a polygon of three or more points `(x, y)`, or a painted mask."""


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
    several = isinstance(region, list | tuple) and not is_numbers(region) and not is_polygon(region)
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
    return torch.from_numpy(outlined(region, whose, image_size, canvas)).float()


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
