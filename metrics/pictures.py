"""Pictures that metrics take: PIL images or tensors, one or many, read strictly, as one kind of tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import MoLEError
from ..pictures import as_seen

Picture: TypeAlias = Image.Image | Tensor
Pictures: TypeAlias = Picture | Sequence[Picture]
"""One picture or many of any sizes: PIL images, or tensors `(3, height, width)` of uint8 or of floats in [0, 1].

A tensor `(batch, 3, height, width)` is many.
"""


def picture_tensors(images: Pictures) -> list[Tensor]:
    """Each picture as `(3, height, width)` of floats in [0, 1].

    Raises:
        TypeError: `images` are neither tensors nor PIL images.
        MoLEError: There are none, or a tensor has another shape, type or values outside of [0, 1].
    """
    return [_to_tensor(image) for image in _one_by_one(images)]


def as_images(images: Pictures) -> list[Image.Image]:
    """Each picture as an RGB image, for what looks at pixels of 8 bits. Raises as `picture_tensors`."""
    return [image if isinstance(image, Image.Image) else _to_image(image) for image in _one_by_one(images)]


def _one_by_one(images: Pictures) -> list[Any]:
    one: list[Any] | tuple[Any, ...]
    if isinstance(images, Tensor):
        one = list(images) if images.ndim == 4 else [images]
    elif isinstance(images, Image.Image):
        one = [images]
    elif isinstance(images, list | tuple):
        one = images
    else:
        raise TypeError(f"`images` must be a tensor or a list of PIL images, got {type(images).__name__}.")
    if not one:
        raise MoLEError("there is no picture to measure: `images` is empty.")
    return [as_seen(image) if isinstance(image, Image.Image) else image for image in one]


def _to_image(image: Any) -> Image.Image:
    return Image.fromarray((_to_tensor(image) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def _to_tensor(image: Any) -> Tensor:
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image, np.float32) / 255).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise TypeError(f"`images` must be a tensor or a list of PIL images, got a list with {type(image).__name__}.")
    known = image.dtype == torch.uint8 or image.is_floating_point()
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel() or not known:
        raise MoLEError(
            f"images are {image.dtype} of shape {tuple(image.shape)}; they must be uint8, or floating point in [0, 1], "
            "of shape (3, height, width) each, or (batch, 3, height, width) together."
        )
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not (image.min() >= 0 and image.max() <= 1):  # NaN is refused too
        low, high = image.min().item(), image.max().item()
        raise MoLEError(f"images have values from {low:.3g} to {high:.3g}; they must lie in [0, 1].")
    return image
