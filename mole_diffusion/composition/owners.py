"""From attention maps to who owns which pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def owners(maps: Tensor, taking_part: Tensor, *, background: float, smoothing: int) -> Tensor:
    """Each pixel to the subject whose words it attends to most, or to nobody.

    Maps are compared in z-scores, each over its own pixels, so that neither the scale of attention nor its width, nor
    the number of heads or of words matters. With `a_i` the map of subject i, smoothed by a mean over a square::

        z_i(p) = (a_i(p) - mean_p a_i) / std_p a_i        owner(p) = argmax_i z_i(p), if max_i z_i(p) > background

    Args:
        maps: Attention of the pixels to each LoRA's words, `(rows, N, height, width)`, not negative.
        taking_part: `(rows | 1, N)` bool; the others own nothing.
        background: The z-score a pixel must exceed to be anybody's.
        smoothing: Side of the square, odd; 1 leaves maps as they are.

    Returns:
        `(rows, N, height, width)` of 0 and 1, summing to at most 1.
    """
    scores = z_scores(smoothed(maps, smoothing))
    scores = scores.masked_fill(~taking_part[..., None, None], float("-inf"))
    best, owner = scores.max(dim=1)
    one_hot = F.one_hot(owner, maps.shape[1]).permute(0, 3, 1, 2)
    return (one_hot * (best > background).unsqueeze(1)).to(torch.float32)


def z_scores(maps: Tensor) -> Tensor:
    """Each map `(..., height, width)` less its mean, in units of its standard deviation. A flat map becomes 0."""
    values = maps.float()
    centred = values - values.mean(dim=(-2, -1), keepdim=True)
    spread = centred.square().mean(dim=(-2, -1), keepdim=True).sqrt()
    tiny = 1e-6 * values.abs().amax(dim=(-2, -1), keepdim=True)
    return torch.where(spread > tiny, centred / spread.clamp_min(torch.finfo(spread.dtype).tiny), 0.0)


def smoothed(maps: Tensor, side: int) -> Tensor:
    """Mean over a square of `side` pixels, cut at the edges of the picture. `(rows, N, height, width)`."""
    if side == 1:
        return maps.float()
    return F.avg_pool2d(maps.float(), side, stride=1, padding=side // 2, count_include_pad=False)
