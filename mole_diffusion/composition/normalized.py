"""Average of LoRAs."""

from __future__ import annotations

from torch import Tensor

from .step import Step
from .steps import StepComposition


class Normalized(StepComposition):
    """Normalised linear arithmetic (NLA): `W x + sum_i w_i E_i(x)` with `w_i = 1 / N` over the kept LoRAs.

    Eq. 2 of "Mixture of LoRA Experts" (https://openreview.net/forum?id=uWvKBCYh4S). The weights sum to one in the
    whole model; a layer that some LoRA does not touch gets a zero term for it. Safe, but it dilutes identities.
    """

    name = "normalized"
    source = "Mixture of LoRA Experts (ICLR 2024), eq. 2"
    constant = True

    def weights(self, keep: Tensor, step: Step | None) -> Tensor:
        return keep / keep.sum(dim=-1, keepdim=True).clamp(min=1)
