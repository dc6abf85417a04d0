"""The norm router as part of a compiled graph: plain operators, of which the compiler makes what it likes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch._dynamo
from torch import Tensor

from ..experts import Site
from ..experts.rules import RULES, Ruled
from .norms import root_like

RULE = "norm_router"
# Of two LoRAs that are the same but for rounding, the first wins: others count for a few digits of the last place less.
LATER = 2.0**-19


def rule_of(site: Site, temperature: float) -> Ruled:
    """What a graph has of the router at a module.

    Args:
        site: The module.
        temperature: As in `NormRouter`.
    """
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    tensors = root_like(site.stack, weight), torch.tensor(site.stack.indices, device=weight.device)
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor, guard=False)  # a recorded CUDA graph need not copy them
    return Ruled(RULE, "", tensors, (temperature,), True)


def _weights(
    features: Tensor, projected: Tensor, choice: Tensor, tensors: Sequence[Tensor], numbers: Sequence[float]
) -> Tensor:
    """As `NormRouter.weigh`, LoRA by LoRA.

    Args:
        features: Not read.
        projected: z = down x, `(batch, tokens, R)`.
        choice: `keep`, `scale`, and 1 for subjects, `(3, batch, N)`.
        tensors, numbers: Of `rule_of`.

    Returns:
        `(batch, tokens, N)`.
    """
    root, columns = tensors
    (temperature,) = numbers
    batch, tokens, number = projected.shape[0], projected.shape[1], len(columns)
    keep, scale, subject = choice[:, :, None].unbind()  # (batch, 1, N)
    lost = (keep * (1 - subject) * scale).expand(-1, tokens, -1)
    competing = (keep * subject).index_select(-1, columns)
    gain = competing * scale.index_select(-1, columns)
    if tokens == 1:
        won = gain / competing.sum(dim=-1, keepdim=True).clamp_min(1)
        return lost.index_add(-1, columns, won)
    z = projected.float().flatten(0, 1)
    if root.ndim == 3:
        coordinates = torch.bmm(z.view(len(z), number, -1).transpose(0, 1), root).transpose(0, 1)
    else:
        coordinates = (z @ root).view(len(z), number, -1)
    norms = coordinates.square().sum(dim=-1).sqrt().view(batch, tokens, number)
    means = norms.mean(dim=1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
    ratios = [
        ((norms[..., i] / means[..., i]) * (1 - LATER * i)).masked_fill(competing[..., i] == 0, float("-inf"))
        for i in range(number)
    ]
    most = functools.reduce(torch.maximum, ratios)
    if temperature > 0:
        most = most.clamp_min(torch.finfo(most.dtype).min)  # where nobody competes
        parts = [((ratio - most) / temperature).exp() for ratio in ratios]
        total = functools.reduce(torch.add, parts).clamp_min(torch.finfo(most.dtype).tiny)
        shares = [part / total for part in parts]
    else:
        shares = [(ratio == most).to(most.dtype) for ratio in ratios]
    return lost.index_add(-1, columns, torch.stack(shares, dim=-1) * gain)


RULES[RULE] = _weights
