"""Each token to the LoRA that has most to say about it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import MoLEError
from ..experts import Projections, Run, Site
from .base import Composition
from .roles import roles


class NormRouter(Composition):
    """At every module, each token goes to the LoRA whose output there is largest for its kind.

    With ``E_i(x_p) = s_i B_i A_i x_p`` the output of LoRA i at token p, LoRAs are compared by
    ``rho_i(p) = |E_i(x_p)| / mean_p |E_i(x_p)|``: a LoRA that is strong everywhere wins nothing by it. Needs no words,
    no masks and no evaluation more. Norms of the full outputs, as SpectR takes them (https://arxiv.org/abs/2504.03454),
    come from the factors' r x r products, so that no output is ever made. Modules without tokens share one unit.

    Styles and utilities take no part and act in full.

    Args:
        temperature: 0, the default: the largest takes all. Otherwise weights are ``softmax(rho_i / temperature)``.

    Raises:
        MoLEError: `temperature` is negative or not finite.
    """

    name = "norm_router"
    source = "norms of the LoRAs' outputs; after SpectR (arXiv 2504.03454)"

    def __init__(self, temperature: float = 0.0) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise MoLEError(f"`temperature` must be 0 (the largest takes all) or positive, got {temperature}.")
        self.temperature = temperature

    def weigh(self, site: Site, projections: Projections, run: Run) -> Tensor:
        projected = projections.tensors[site.name]
        subject = roles(run, "subject")
        there = torch.zeros_like(subject)
        there[list(site.stack.experts)] = 1
        competing = (run.keep * subject * there)[:, None]  # (rows, 1, N)
        others = (run.keep * (1 - subject))[:, None]
        if projected.shape[1] == 1:
            shares = competing / competing.sum(dim=-1, keepdim=True).clamp(min=1)
        else:
            ratios = site.stack.norms(projected)
            ratios = ratios / ratios.mean(dim=1, keepdim=True).clamp_min(torch.finfo(ratios.dtype).tiny)
            ratios = ratios.masked_fill(competing == 0, float("-inf"))
            if self.temperature > 0:
                shares = torch.softmax(ratios / self.temperature, dim=-1).nan_to_num()
            else:
                shares = (
                    ratios.argmax(dim=-1, keepdim=True) == torch.arange(ratios.shape[-1], device=ratios.device)
                ).float()
            shares = shares * competing
        return (shares + others) * run.scale[:, None]
