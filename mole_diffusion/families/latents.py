"""Latents of transformers: patches in a row, and how far their size shifts the noise levels of a call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LATENT_SIDE = 128  # of the pictures that transformers are made for, 1024 x 1024, where a pipeline says nothing


def latent_side(pipe: Any) -> int:
    """Latent pixels to a side of a picture of the base's own size."""
    return int(getattr(pipe, "default_sample_size", LATENT_SIDE))


def size_shift(pipe: Any, tokens: int) -> float | None:
    """The shift of the noise levels of a picture of so many tokens, as FLUX's pipeline and its kin work it out.

    `None` where the scheduler has a shift of its own.
    """
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting", False):
        return None
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return time_shift(config, low + (high - low) * (tokens - least) / (most - least))


def time_shift(config: Any, mu: float) -> float:
    """The factor `a` of `a s / (1 + (a - 1) s)` that a scheduler makes of `mu`."""
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def from_patches(patches: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """`(rows, height * width, channels * 4)` patches of 2 x 2 as latents `(rows, channels, 2 * height, 2 * width)`.

    Args:
        patches: A row of them for each picture.
        grid: Height and width in patches; `None`: as many to each side.
    """
    rows, tokens, width = patches.shape
    down, across = grid or (math.isqrt(tokens), math.isqrt(tokens))
    placed = patches.view(rows, down, across, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return placed.reshape(rows, width // 4, 2 * down, 2 * across)


def to_patches(latents: Tensor) -> Tensor:
    """Latents `(rows, channels, height, width)` as `(rows, height / 2 * width / 2, channels * 4)` patches of 2 x 2."""
    rows, channels, height, width = latents.shape
    grid = latents.view(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return grid.reshape(rows, height // 2 * (width // 2), channels * 4)


def positions(rows: int, columns: int, axes: int, like: Tensor) -> Tensor:
    """`(rows * columns, axes)`: row and column of every token on the axes 1 and 2, zeros on the others."""
    found = torch.zeros(rows, columns, axes, device=like.device, dtype=like.dtype)
    found[..., 1] = torch.arange(rows, device=like.device)[:, None]
    found[..., 2] = torch.arange(columns, device=like.device)
    return found.flatten(0, 1)
