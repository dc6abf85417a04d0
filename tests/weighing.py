"""The plainest weigher: the same numbers in every module."""

from __future__ import annotations

import torch
from torch import Tensor

from mole_diffusion.experts import Projections, Run, Site


class Numbers:
    """Weights `(N,)` or `(rows, N)` for every module, if asked for divided by their sum over the kept LoRAs."""

    def __init__(self, values: Tensor, renormalize: bool = False) -> None:
        self.values = values if values.ndim == 2 else values[None]
        self.renormalize = renormalize

    def weigh(self, site: Site, projections: Projections, run: Run) -> Tensor:
        weights = self.values * run.keep
        if self.renormalize:
            total = weights.sum(dim=-1, keepdim=True)
            weights = weights / torch.where(total == 0, torch.ones_like(total), total)
        return (weights * run.scale)[:, None]
