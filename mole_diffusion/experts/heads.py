"""Heads of queries and keys as features of their tokens, and back."""

from __future__ import annotations

from torch import Tensor


def together(heads: Tensor, axis: int) -> Tensor:
    """`(batch, tokens, heads, d)`, or with its heads on axis 1, as `(batch, tokens, heads * d)`."""
    return heads.transpose(axis, 2).flatten(2)


def apart(features: Tensor, axis: int, like: Tensor) -> Tensor:
    """The other way round.

    Args:
        features: `(batch, tokens, heads * d)`.
        axis: Of the heads in the result.
        like: A tensor in the shape of the result.
    """
    return features.unflatten(2, (-1, like.shape[-1])).transpose(axis, 2)
