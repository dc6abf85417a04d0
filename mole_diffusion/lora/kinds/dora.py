"""DoRA (Liu et al., https://arxiv.org/abs/2402.09353, eq. 5): a change of weight with a magnitude of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import KindError, Shape

NAME = "DoRA"
PARTS = ("magnitude", "dora_scale")


def axis(part: str, shape: Shape, out: int, channels: int) -> int:
    """Whether magnitudes are one for each output row of a weight, 0, or one for each input channel, 1.

    PEFT (`"magnitude"`) has outputs, `(d_out,)` and `(1, d_out, 1, 1)`. kohya and LyCORIS (`"dora_scale"`) have
    outputs, `(d_out, 1, …)`, with `wd_on_out`, inputs, `(1, d_in, …)`, without; OneTrainer has inputs unless told
    otherwise.

    Raises:
        KindError: The shape is neither.
    """
    rows = {(out,), (out, 1), (out, 1, 1, 1)}
    if shape in (rows | {(1, out, 1, 1)} if part == "magnitude" else rows):
        return 0
    if part == "dora_scale" and shape in ((1, channels), (1, channels, 1, 1)):
        return 1
    raise KindError(f"magnitudes {shape} fit neither {out} outputs nor {channels} inputs")


def magnitudes(part: str, tensor: Tensor, out: int, channels: int) -> Tensor:
    """Magnitudes as `(d_out, 1)` or `(1, d_in)`."""
    return tensor.reshape(-1, 1) if axis(part, tuple(tensor.shape), out, channels) == 0 else tensor.reshape(1, -1)


def scale(magnitude: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
    """c of eq. 5, by which rows or columns of `weight + delta` are multiplied: `magnitude / |weight + delta|`.

    Args:
        magnitude: `(d_out, 1)` or `(1, d_in)`.
        weight: The weight of the module, `(d_out, d_in, …)`.
        delta: Change of it before the magnitude, of this LoRA alone.

    Returns:
        In the shape of `magnitude`.
    """
    changed = weight + delta
    by_row = magnitude.shape[1] == 1
    flat = changed.flatten(1) if by_row else changed.transpose(0, 1).flatten(1).T
    norms = torch.linalg.vector_norm(flat, dim=1 if by_row else 0, keepdim=True)
    # What has no length stays zero, whatever it is multiplied by.
    return magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)
