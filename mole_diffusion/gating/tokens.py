"""The token axis of a gate: from any number of positions to as many as the gate has parameters for."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from mole_diffusion.errors import MoLEError

from .config import TokenAxis


def reduce_tokens(features: Tensor, axis: TokenAxis, positions: int, size: tuple[int, int] | None, gate: str) -> Tensor:
    """`(batch, tokens, features)` to `(batch, positions, features)`.

    All three readings are linear, so pooling `A x` and applying B is pooling `B A x`.

    Args:
        features: Expert outputs, or their coordinates in rank space.
        axis: As in `GateConfig`, other than `"token"`, which leaves every position to itself.
        positions: What the gate was made for.
        size: `(height, width)` of the tokens where they are the pixels of a picture.
        gate: Name of the gate, for messages.

    Raises:
        MoLEError: `"flatten"` meets another number of tokens.
    """
    tokens = features.shape[1]
    if axis == "pooled":
        return features.mean(dim=1, keepdim=True)
    if axis == "flatten":
        if tokens != positions:
            raise MoLEError(
                f"The gate at {gate} was made with token_axis='flatten' for {positions} tokens, and now there are "
                f"{tokens}. Use the resolution (or prompt length) it was trained at, or gates with token_axis='pooled'."
            )
        return features
    channels_first = features.transpose(1, 2)  # (batch, features, tokens)
    if size is None:
        return F.adaptive_avg_pool1d(channels_first, positions).transpose(1, 2)
    grid = F.adaptive_avg_pool2d(channels_first.unflatten(-1, size), int(axis))  # (batch, features, k, k)
    return grid.flatten(2).transpose(1, 2)


class Place(Protocol):
    """A module or attention layer of a denoiser: its name, and how often the picture was halved on its way there."""

    name: str
    halvings: int


def token_grid(tokens: int, sample_size: tuple[int, int] | None, place: Place) -> tuple[int, int]:
    """Height and width of a denoiser layer's tokens: the sample's, halved (rounding up) as often as the model does.

    Raises:
        MoLEError: There are more or fewer, or the sample has no height and width.
    """
    if sample_size is not None:
        height, width = (-(-side // 2**place.halvings) for side in sample_size)
        if height * width == tokens:
            return height, width
    raise MoLEError(
        f"{tokens} tokens at {place.name} are no picture of a sample of size {sample_size}, as where a model has no "
        "pixels, or something merges them or adds others (token merging, reference pictures in self-attention). Use "
        "what knows no places: `set_composition(\"budget\")`, or gates with token_axis='pooled'."
    )
