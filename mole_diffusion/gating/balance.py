"""Losses that keep every LoRA in use: equations (14) and (15), and a floor."""

from __future__ import annotations

import torch
from torch import Tensor

from mole_diffusion.errors import MoLEError


def balance_loss(gates: Tensor, present: Tensor | None = None) -> Tensor:
    """Gating balance loss of MoLE: `L = - sum_i log q_i`, q_i the mean gate of LoRA i over all gated places.

    Eqs. 14-15 of "Mixture of LoRA Experts" (https://openreview.net/forum?id=uWvKBCYh4S). The smallest value is
    `N log N`, reached where all q_i are equal; there its gradient is zero.

    Args:
        gates: `(places, N)` or `(batch, places, N)`, each row summing to one. Gradients flow to them.
        present: `(places, N)`, False where a LoRA does not touch a place. q_i is then the mean over the places
            LoRA i does touch, and a LoRA that touches none is left out. `None`: every LoRA is everywhere.

    Returns:
        A scalar; the mean over the batch.

    Raises:
        MoLEError: Shapes do not fit.
    """
    # A softmax can underflow to an exact zero; the loss then is large but finite.
    usage = mean_usage(gates, present)
    return -usage.clamp_min(torch.finfo(usage.dtype).tiny).log().sum(dim=-1).mean()


def floor_loss(gates: Tensor, floor: float, present: Tensor | None = None) -> Tensor:
    """Lifts only what is neglected: `L = - sum_i log min(q_i / floor, 1)`, q_i as in `balance_loss`.

    Zero, with a zero gradient, as soon as every LoRA has at least the share `floor`; below it, the gradient by q_i is
    that of the balance loss.

    Args:
        gates: As in `balance_loss`.
        floor: The least share of a LoRA; more than 0, and at most 1 / N to be within reach.
        present: As in `balance_loss`.

    Returns:
        A scalar; the mean over the batch.

    Raises:
        MoLEError: Shapes do not fit.
    """
    usage = mean_usage(gates, present)
    share = (usage / floor).clamp(torch.finfo(usage.dtype).tiny, 1)
    return -share.log().sum(dim=-1).mean()


def mean_usage(gates: Tensor, present: Tensor | None = None) -> Tensor:
    """Eq. 15, `q_i = 1/M sum_k G_i^k`: how much LoRA i is used over the places it touches.

    Args:
        gates: As in `balance_loss`.
        present: As in `balance_loss`.

    Returns:
        `(N,)` or `(batch, N)`, without the LoRAs that touch no place.

    Raises:
        MoLEError: Shapes do not fit.
    """
    if gates.ndim not in (2, 3) or 0 in gates.shape:
        raise MoLEError(f"`gates` must be (places, N) or (batch, places, N), got {tuple(gates.shape)}.")
    if present is None:
        present = torch.ones(gates.shape[-2:], dtype=torch.bool)
    if present.shape != gates.shape[-2:]:
        raise MoLEError(
            f"`present` must be {tuple(gates.shape[-2:])}, (places, N), like `gates`, got {tuple(present.shape)}."
        )
    mask = present.to(gates.device, gates.dtype)
    places = mask.sum(dim=0)  # (N,), where each LoRA can act at all
    used = places > 0
    return (gates * mask).sum(dim=-2)[..., used] / places[used]
