"""One LoRA at a time."""

from __future__ import annotations

import math

from torch import Tensor

from ..errors import MoLEError
from ..methods import SwitchOptions
from .step import Step
from .steps import StepComposition


class Switch(SwitchOptions, StepComposition):
    """LoRA Switch: in each step one LoRA alone at full weight, the next one after every few steps.

    "Multi-LoRA Composition for Image Generation" (https://arxiv.org/abs/2402.16843): step k, from 0, draws with the
    `floor(k / every) mod N`-th of the kept LoRAs, in the order in which they were loaded; the authors put characters
    first. The prompt is read once for all steps, so text encoders carry all LoRAs at full weight. (The authors' code
    reads it with whichever LoRA was active first, and lets that one draw a step longer.)

    Args:
        every: Steps until the next LoRA's turn.

    Raises:
        MoLEError: `every` is below 1.
    """

    name = "switch"
    source = "Multi-LoRA Composition (arXiv 2402.16843), LoRA Switch"

    def weights(self, keep: Tensor, step: Step | None) -> Tensor:
        """As in `StepComposition`.

        Raises:
            MoLEError: There are too few steps for every LoRA to have a turn.
        """
        if step is None:
            return keep
        several, turns = int(keep.sum(dim=-1).max()), math.ceil(step.total / self.every)
        if 1 < step.total and turns < several:  # a model outside of any pipeline has one step
            raise MoLEError(
                f"composition 'switch' draws {self.every} steps with each LoRA in turn, and {step.total} steps leave "
                f"none for {several - turns} of {several}. Take more than {(several - 1) * self.every} steps, fewer "
                "LoRAs, or shorter turns, of which `set_composition(Switch(every=1))` has the shortest."
            )
        turn = (step.index // self.every) % keep.sum(dim=-1, keepdim=True).clamp(min=1)
        return keep * (keep.cumsum(dim=-1) - 1 == turn)
