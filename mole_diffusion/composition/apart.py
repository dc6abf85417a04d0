"""Prompts of regions in one sequence with the call's prompt and the pixels: who sees whom."""

from __future__ import annotations

import torch
from torch import Tensor

from ..families import Joint


def kept_apart(whose: Tensor, shares: Tensor, joint: Joint, tokens: int) -> Tensor:
    """What is added to the scores, so that a region's prompt is read in its region alone.

    With `s_k(p)` the share of region k in pixel p, a pixel's attention to the words of k, and theirs to it, is
    multiplied by `s_k(p)` before it is normalised: 1 inside, 0 outside, less along a soft edge. These words see each
    other, and nothing of the call's prompt or of other regions'; the call's prompt, and what is neither words nor
    pixels, sees none of them, as if they were not there.

    Args:
        whose: `(rows, words)`: 0 for a token of the call's prompt, k for one of the k-th region's, −1 for one that only
            fills a row up.
        shares: s, `(rows | 1, pixels, regions)`.
        joint: Where words and pixels stand.
        tokens: How many there are in all.

    Returns:
        `(rows, 1, tokens, tokens)`, of queries and keys, float32.
    """
    rows, (text, pixels) = len(whose), joint
    never = float("-inf")
    added = shares.new_zeros(rows, tokens, tokens)
    apart = whose[:, :, None] != whose[:, None, :]
    added[:, text, text] = added[:, text, text].masked_fill(apart, never)
    neither = torch.ones(tokens, dtype=torch.bool, device=whose.device)
    neither[text] = neither[pixels] = False
    hidden = torch.zeros(rows, tokens, dtype=torch.bool, device=whose.device)
    hidden[:, text] = whose != 0
    added.masked_fill_(neither[:, None] & hidden[:, None, :], never)
    # One more column before and behind: everybody sees the call's prompt, and nobody what fills up.
    columns = torch.nn.functional.pad(shares.log(), (1, 0))
    columns = torch.nn.functional.pad(columns, (0, 1), value=never)
    index = (whose % columns.shape[-1])[:, None].expand(-1, columns.shape[1], -1)
    seen = columns.expand(rows, -1, -1).gather(2, index)  # (rows, pixels, words)
    added[:, pixels, text] = seen
    added[:, text, pixels] = seen.transpose(1, 2)
    return added[:, None]
