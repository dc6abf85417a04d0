"""Pictures in: files, PIL images or tensors, read strictly, as one kind of tensor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

Pictures: TypeAlias = Tensor | Sequence[Image.Image]
"""A floating-point batch `(batch, 3, height, width)` in [0, 1], or PIL images of any sizes."""


def picture_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures of a folder, by name.

    Raises:
        ValueError: There is no such folder, or no picture in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder of pictures.")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{path}: no picture in this folder. Known are {', '.join(SUFFIXES)}.")
    return files


def read_picture(file: str | os.PathLike[str]) -> Image.Image:
    """A picture, RGB, read to its end.

    Raises:
        ValueError: The file is cut short or is no picture.
        FileNotFoundError: There is no such file.
    """
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL raises SyntaxError for broken PNGs
        raise ValueError(f"{os.fspath(file)} cannot be read as a picture: {error}. Write it again.") from None


def by_picture(images: Pictures) -> list[Tensor]:
    """Each picture as `(3, height, width)` in [0, 1].

    Raises:
        TypeError: `images` are neither a tensor nor PIL images.
        ValueError: There are none, or a tensor has another shape or values outside of [0, 1].
    """
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; they must be floating point in [0, 1] "
                "of shape (batch, 3, height, width)."
            )
        if len(images) and not (images.min() >= 0 and images.max() <= 1):  # NaN is refused too
            low, high = images.min().item(), images.max().item()
            raise ValueError(f"images have values from {low:.3g} to {high:.3g}; they must lie in [0, 1].")
        pictures = list(images)
    elif isinstance(images, list | tuple) and all(isinstance(image, Image.Image) for image in images):
        pictures = [_to_tensor(image) for image in images]
    else:
        raise TypeError(f"`images` must be a tensor or a list of PIL images, got {type(images).__name__}.")
    if not pictures:
        raise ValueError("there is no picture to measure: `images` is empty.")
    return pictures


def _to_tensor(image: Image.Image) -> Tensor:
    array = np.asarray(image.convert("RGB"), np.float32) / 255
    return torch.from_numpy(array).permute(2, 0, 1)
