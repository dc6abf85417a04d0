"""Plain sum of LoRAs."""

from __future__ import annotations

from torch import Tensor

from .step import Step
from .steps import StepComposition


class Linear(StepComposition):
    """Linear arithmetic composition: `W x + sum_i E_i(x)`, every LoRA at full weight.

    Eq. 1 of "Mixture of LoRA Experts" (https://openreview.net/forum?id=uWvKBCYh4S). One LoRA is exactly that LoRA;
    with three or more the sum leaves the range the base was trained in, and pictures fall apart.
    """

    name = "linear"
    source = "Mixture of LoRA Experts (ICLR 2024), eq. 1"
    constant = True

    def weights(self, keep: Tensor, step: Step | None) -> Tensor:
        return keep
