"""Every LoRA alone, predictions averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from .step import Step
from .steps import StepComposition


class Composite(StepComposition):
    """LoRA Composite: one pass for each kept LoRA alone at full weight; their predictions are averaged.

    "Multi-LoRA Composition for Image Generation" (https://arxiv.org/abs/2402.16843). Conditional and unconditional
    predictions are averaged each for itself, before guidance, and it works without guidance too. The prompt is read
    once for all passes, so text encoders carry all LoRAs at full weight. Unlike the authors' code it keeps the scales
    the user gave each LoRA.
    """

    name = "composite"
    source = "Multi-LoRA Composition (arXiv 2402.16843), LoRA Composite"

    def weights(self, keep: Tensor, step: Step | None) -> Tensor:
        return keep

    def weights_by_pass(self, keep: Tensor, step: Step) -> Tensor:
        kept_by_any = keep.any(dim=0).nonzero().flatten()  # LoRAs, one pass each
        weights = torch.zeros(len(kept_by_any), *keep.shape, dtype=keep.dtype, device=keep.device)
        for index, lora in enumerate(kept_by_any.tolist()):
            weights[index, :, lora] = keep[:, lora]
        return weights

    def mix(self, predictions: Tensor, weights: Tensor) -> Tensor:
        # Where rows keep different LoRAs, a row counts the passes of its own; one that keeps none has the base in all.
        counts = weights.sum(dim=-1)  # (passes, rows), 0 or 1
        counts = torch.where(counts.sum(dim=0) == 0, torch.ones_like(counts), counts)
        shares = counts / counts.sum(dim=0)
        shares = shares.view(*shares.shape, *[1] * (predictions.ndim - 2))
        return (shares.to(predictions.dtype) * predictions).sum(dim=0)

    def evaluations(self, num_loras: int) -> int:
        return max(1, num_loras)
