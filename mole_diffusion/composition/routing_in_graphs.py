"""The norm router as part of a compiled graph: plain operators, of which the compiler makes what it likes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch._dynamo
from torch import Tensor

from ..experts import Site
from ..experts.rules import RULES, Ruled
from .norms import root_like, roots_like

RULE = "norm_router"
# Of two LoRAs that are the same but for rounding, the first wins: others count for a few digits of the last place less.
LATER = 2.0**-19


def rule_of(site: Site, temperature: float) -> Ruled:
    """What a graph has of the router at a module.

    Args:
        site: The module.
        temperature: As in `NormRouter`.
    """
    site = site.only(None, orthonormal=True)
    weight, stack, group = site.module.weight, site.stack, site.group
    assert isinstance(weight, Tensor)
    together = group.several and group.alike and stack.same_rank and not stack.is_convolution
    tensors = [torch.tensor(stack.indices, device=weight.device)]
    if not (stack.orthonormal and stack.same_rank):
        tensors.append(roots_like(group, weight) if together else root_like(stack, weight))
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor, guard=False)  # a recorded CUDA graph need not copy them
    numbers = temperature, float(len(group.sites) if together else 1)
    return Ruled(RULE, "", tuple(tensors), numbers, True, together, stack.orthonormal)


def _weights(
    features: Tensor, projected: Tensor, choice: Tensor, tensors: Sequence[Tensor], numbers: Sequence[float]
) -> Tensor:
    """As `NormRouter.weigh`, LoRA by LoRA.

    Args:
        features: Not read.
        projected: z = down x, `(batch, tokens, R)`; of several modules that have the same LoRAs, side by side.
        choice: `keep`, `scale`, and 1 for subjects, `(3, batch, N)`.
        tensors, numbers: Of `rule_of`.

    Returns:
        `(batch, tokens, N)`; `(batch, tokens, modules, N)` of several modules.
    """
    (columns, *roots), (temperature, modules) = tensors, (numbers[0], int(numbers[1]))
    batch, tokens, number = projected.shape[0], projected.shape[1], len(columns)
    keep, scale, subject = choice[:, :, None, None].unbind()  # (batch, 1, 1, N)
    lost = (keep * (1 - subject) * scale).expand(-1, tokens, modules, -1)
    everyone = number == choice.shape[-1]  # in their order: then nothing need be looked up
    competing, scales = keep * subject, scale
    if not everyone:
        competing, scales = competing.index_select(-1, columns), scale.index_select(-1, columns)
    if tokens == 1:
        won = competing * scales / competing.sum(dim=-1, keepdim=True).clamp_min(1)
    else:
        sizes = _sizes(projected, modules * number, roots).view(batch, tokens, modules, number)
        won = _shares(sizes, competing, temperature) * (competing * scales)
    weights = lost + won if everyone else lost.index_add(-1, columns, won.expand(-1, -1, modules, -1))
    return weights if modules > 1 else weights.squeeze(2)


def _sizes(projected: Tensor, number: int, roots: Sequence[Tensor]) -> Tensor:
    """Of every output, but for one number for each, `(batch * tokens, number)`; `roots` is empty where rows tell it."""
    z = projected.float().flatten(0, 1)
    if not roots:
        z = z.view(len(z), number, -1)
    elif roots[0].ndim == 3:
        z = torch.bmm(z.view(len(z), number, -1).transpose(0, 1), roots[0]).transpose(0, 1)
    else:
        z = (z @ roots[0]).view(len(z), number, -1)
    return z.square().sum(dim=-1).sqrt()


def _shares(sizes: Tensor, competing: Tensor, temperature: float) -> Tensor:
    """What each LoRA gets of each token.

    Args:
        sizes: `(batch, tokens, modules, n)`.
        competing: 0 for those that do not, `(batch, 1, 1, n)`.
        temperature: As in `NormRouter`.
    """
    means = sizes.mean(dim=1, keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)
    ratios = [
        ((sizes[..., i] / means[..., i]) * (1 - LATER * i)).masked_fill(competing[..., i] == 0, float("-inf"))
        for i in range(sizes.shape[-1])
    ]
    most = functools.reduce(torch.maximum, ratios)
    if temperature == 0:
        return torch.stack([(ratio == most).to(most.dtype) for ratio in ratios], dim=-1)
    most = most.clamp_min(torch.finfo(most.dtype).min)  # where nobody competes
    parts = [((ratio - most) / temperature).exp() for ratio in ratios]
    total = functools.reduce(torch.add, parts).clamp_min(torch.finfo(most.dtype).tiny)
    return torch.stack([part / total for part in parts], dim=-1)


RULES[RULE] = _weights
