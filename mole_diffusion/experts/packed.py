"""Modules that are given the tokens of all samples one after another, as if each sample had some rows of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def unpacked(tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """`(..., features)` as `(samples, longest, features)`, with zeros behind the shorter ones.

    Args:
        tokens: Of all samples, in order; how they are laid out over the first axes does not matter.
        lengths: How many each sample has.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    if len(set(lengths)) == 1:
        return flat.unflatten(0, (len(lengths), lengths[0]))
    return pad_sequence(flat.split(list(lengths)), batch_first=True)


def packed(samples: Tensor, lengths: Sequence[int]) -> Tensor:
    """The other way round: `(samples, longest, features)` as `(tokens, features)`."""
    if len(set(lengths)) == 1:
        return samples.flatten(0, 1)
    return torch.cat([sample[:length] for sample, length in zip(samples, lengths, strict=True)])
