"""The optimiser of a training and the learning rate of each of its steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mole_diffusion.training.engine.settings import LearningRateSchedule


def learning_rate_factor(step: int, steps: int, warmup_steps: int, schedule: LearningRateSchedule = "cosine") -> float:
    """Linear warm-up over `warmup_steps`, then 1, or half a cosine down from 1 towards zero at `steps`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def make_optimizer(parameters: list[Tensor], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW in one fused kernel, which matters with hundreds of small LoRA factors."""
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)
