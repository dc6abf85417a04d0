"""Several prompts in one text: those of a call, and behind each the prompts that regions have of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

PROMPT = 0
NOBODY = -1


class Together(NamedTuple):
    """Prompts with others behind them.

    Attributes:
        encoded: What `encode_prompt` gave for the prompts, with the tokens of the others behind theirs.
        whose: Whose each token is, `(rows, tokens)`: 0 for one of the prompt, k for one of the k-th other.
        negative: The same for a negative prompt in the same batch that was filled up to the same length, `(tokens,)`:
            −1 for what only fills it up. `None`: none was.
    """

    encoded: Any
    whose: Tensor
    negative: Tensor | None = None


def behind(prompts: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Rows of others, `(1, tokens, …)` each, behind every row of prompts, `(rows, tokens, …)`."""
    return torch.cat([prompts, *(other.expand(len(prompts), *other.shape[1:]) for other in others)], dim=1)


def whose(prompts: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Whose each token of `behind(prompts, others)` is, `(rows, tokens)`."""
    lengths = [prompts.shape[1], *(other.shape[1] for other in others)]
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(len(prompts), -1)


def masks_behind(
    prompts: Tensor, mask: Tensor | None, others: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> Tensor | None:
    """Which tokens of `behind(prompts, others)` are there, `(rows, tokens)`; `None`: all are.

    Args:
        prompts: Embeddings `(rows, tokens, …)`.
        mask: Which of their tokens are there, `(rows, tokens)`; `None`: all are.
        others: Embeddings of the others, `(1, tokens, …)` each.
        masks: Which of their tokens are there.
    """
    if mask is None and all(one is None for one in masks):
        return None
    like = next(one for one in (mask, *masks) if one is not None)
    filled = [
        like.new_ones(embeds.shape[:2]) if one is None else one
        for embeds, one in zip((prompts, *others), (mask, *masks), strict=True)
    ]
    return behind(filled[0], filled[1:])
