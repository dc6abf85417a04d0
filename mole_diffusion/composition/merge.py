"""Plain sum of LoRAs times one scale."""

from __future__ import annotations

from torch import Tensor

from ..methods import MergeOptions
from .step import Step
from .steps import StepComposition


class Merge(MergeOptions, StepComposition):
    """LoRA Merge: `W x + s sum_i E_i(x)`, one scale for every LoRA, however many there are.

    The baseline of "Multi-LoRA Composition for Image Generation" (https://arxiv.org/abs/2402.16843), which sets the
    scale to 0.8. At 1 it is `Linear`.

    Args:
        scale: s.

    Raises:
        MoLEError: `scale` is not finite, or so large that the picture would be black.
    """

    name = "merge"
    source = "Multi-LoRA Composition (arXiv 2402.16843), LoRA Merge"
    constant = True

    def weights(self, keep: Tensor, step: Step | None) -> Tensor:
        return self.scale * keep
