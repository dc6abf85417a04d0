"""Mixture of LoRA Experts: the gates in the layers weigh."""

from __future__ import annotations

from torch import Tensor

from .base import Composition, Step


class MoLE(Composition):
    """Trained gates choose the weights anew in every layer, step and sample.

    Eqs. 5-13 of "Mixture of LoRA Experts" (https://openreview.net/forum?id=uWvKBCYh4S). The gates live in
    :mod:`mole_diffusion.gating`; masking a LoRA renormalises the others in proportion.
    """

    name = "mole"
    source = "Mixture of LoRA Experts (ICLR 2024), eqs. 5-13"
    needs_gates = True

    def weights(self, keep: Tensor, step: Step | None) -> None:
        return None
