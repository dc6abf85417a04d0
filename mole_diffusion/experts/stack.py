"""The low-rank factors of N LoRAs at one module, stacked into two matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mole_diffusion.errors import MoLEError

from ..lora import LoRAFactors

# Weights per LoRA to the same per rank, by the ranks of a module; an entry goes with the tensor it was made from.
_BY_RANK: Any = WeakIdKeyDictionary()


class ExpertStack:
    """All experts of one module: ``sum_i gamma_i s_i B_i A_i x = up (gamma * down x)``.

    Two products serve any number of LoRAs and any mixture of ranks, and a weight may differ per sample, per token and
    per rank. With R the sum of the ranks:

    Attributes:
        down: ``(R, d_in)`` or, for a convolution, ``(R, c_in, kh, kw)``. fp32, as loaded.
        up: ``(d_out, R)``, with every LoRA's scaling folded in. fp32.
        ranks: r of every LoRA in order; 0 where a LoRA does not touch this module.
        experts: Indices of the LoRAs that do.
        expert_of_rank: ``(R,)``, the LoRA each row of ``down`` belongs to.

    Args:
        factors: One entry per LoRA, ``None`` where it does not touch the module.
        place: Readable name of the module, for messages.

    Raises:
        ValueError: If no LoRA touches the module or their shapes disagree.
    """

    def __init__(self, factors: Sequence[LoRAFactors | None], place: str) -> None:
        present = [(index, factor) for index, factor in enumerate(factors) if factor is not None]
        if not present:
            raise MoLEError(f"No LoRA has factors for {place}; leave the module out instead.")
        inputs = {tuple(factor.down.shape[1:]) for _, factor in present}
        outputs = {factor.up.shape[0] for _, factor in present}
        if len(inputs) > 1 or len(outputs) > 1:
            raise MoLEError(
                f"The LoRAs disagree about {place}: inputs {sorted(inputs)}, outputs {sorted(outputs)}. "
                "They were trained for different base models; load only those that fit yours."
            )
        self.num_experts = len(factors)
        self.ranks = tuple(0 if factor is None else factor.down.shape[0] for factor in factors)
        self.experts = tuple(index for index, _ in present)
        self.down = torch.cat([factor.down for _, factor in present])
        ranks = torch.tensor([factor.r for _, factor in present])
        self.expert_of_rank = torch.tensor(self.experts).repeat_interleave(ranks)
        self._unscaled_up = torch.cat([factor.up.flatten(1) for _, factor in present], dim=1)
        scalings = torch.tensor([factor.scaling for _, factor in present], dtype=torch.float64)
        self._scaling_of_rank = scalings.repeat_interleave(ranks)
        self._cast_up: Tensor | None = None

    @property
    def is_convolution(self) -> bool:
        return self.down.ndim == 4

    @property
    def up(self) -> Tensor:
        return self.up_as(torch.float32)

    def up_as(self, dtype: torch.dtype) -> Tensor:
        """``up`` in another dtype, scaled before it is rounded."""
        wide = torch.promote_types(dtype, torch.float32)
        return (self._unscaled_up.to(wide) * self._scaling_of_rank.to(wide)).to(dtype)

    def up_like(self, output: Tensor) -> Tensor:
        """``up`` on the device and in the dtype of ``output``; converted once and kept."""
        up = self._cast_up
        if up is None or up.device != output.device or up.dtype != output.dtype:
            self._cast_up = up = self.up_as(output.dtype).to(output.device)
        return up

    def per_rank(self, weights: Tensor) -> Tensor:
        """Weights per LoRA ``(batch, tokens, N)`` repeated for each of its ranks here: ``(batch, tokens, R)``.

        The answer is kept as long as ``weights`` lives, and shared by all modules of these ranks: a weigher that gives
        the same tensor to many modules, or pass after pass, has it worked through once.
        """
        if weights.requires_grad:
            return weights[..., self.expert_of_rank.to(weights.device)]
        known = _BY_RANK.setdefault(weights, {})
        if self.ranks in known:
            return known[self.ranks]
        if self.expert_of_rank.device != weights.device:
            self.expert_of_rank = self.expert_of_rank.to(weights.device)
        by_rank = known[self.ranks] = weights[..., self.expert_of_rank]
        return by_rank

    def expand(self, projected: Tensor, weights: Tensor, output: Tensor) -> Tensor:
        """``up (gamma * z)``, shaped like the module's ``output``.

        Args:
            projected: z = down x, ``(batch, tokens, R)``.
            weights: gamma, ``(batch | 1, tokens | 1, R)``.
            output: What the base module gave; only its shape, dtype and device are read.
        """
        # The product is taken in the wider of both dtypes, then rounded once.
        weighted = (projected * weights).to(projected.dtype)
        delta = torch.nn.functional.linear(weighted, self.up_like(output))  # (batch, tokens, d_out)
        if self.is_convolution:
            delta = delta.transpose(1, 2)  # (batch, d_out, tokens)
        return delta.reshape(output.shape)
