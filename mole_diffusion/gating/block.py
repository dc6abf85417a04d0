"""Experts by the paper's letter: what a LoRA changes in the output of a whole transformer block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MoLEError
from ..experts import Run


class BlockExperts:
    """Runs one block under every LoRA alone: `E_i = F_{theta + delta_i}(x) - F_theta(x)`.

    Eqs. 5-8 and 12-13 of "Mixture of LoRA Experts" (https://openreview.net/forum?id=uWvKBCYh4S). Eqs. 7-8 read
    literally keep the residual stream in every expert, and (13) would add it twice; as a difference to the base, one
    LoRA with gate 1 is that LoRA exactly.

    Args:
        indices: Those of the LoRAs that touch the block.
        num_experts: N of the whole model.
    """

    def __init__(self, indices: tuple[int, ...], num_experts: int) -> None:
        self.indices = indices
        self._one_hot = torch.eye(num_experts)

    def weights(self, run: Run) -> Tensor | None:
        """Weights of the modules inside the block just now: the LoRA that acts alone in full, or none."""
        solo = run.notes.get(self)
        return None if solo is None else self._one_hot[solo][None, None]

    def mix(
        self,
        run: Run,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
        weigh: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """`O = F_theta(x) + sum_i g_i E_i`.

        Args:
            run: The forward pass the block runs in.
            block: The block.
            args: What it was called with.
            kwargs: What it was called with.
            output: What the base answered, `(batch, tokens, features)`.
            weigh: Turns the expert outputs `(batch, tokens, len(indices), features)` into final weights
                `(batch, len(indices))`.
        """
        if not isinstance(output, Tensor):
            raise MoLEError(
                f"experts='block' needs blocks of one output, and {type(block).__name__} gives {len(output)}: words "
                "and pixels. Make gates with GateConfig(experts='module'), whose experts are the LoRAs' shares."
            )
        changes = []
        try:
            for index in self.indices:
                run.notes[self] = index
                changes.append(block.forward(*args, **kwargs) - output)
        finally:
            run.notes.pop(self, None)
        expert_outputs = torch.stack(changes, dim=2)  # (batch, tokens, experts, features)
        gates = weigh(expert_outputs).to(output.dtype)
        return output + torch.einsum("bn,blnd->bld", gates, expert_outputs)
