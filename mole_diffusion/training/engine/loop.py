"""What every training loop here shares: random numbers, learning rate, settings, the stop at NaN."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mole_diffusion.errors import MoLEError

LearningRateSchedule = Literal["cosine", "constant"]


class TrainingDivergedError(MoLEError):
    """The loss became NaN or infinite; the message names the step."""


def step_generator(seed: int, step: int) -> torch.Generator:
    """A fresh CPU generator for one step: the numbers of step k do not depend on where a resumed run began.

    On the CPU whatever the device, so that a run draws the same pictures and noise everywhere.
    """
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


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


def check_finite(losses: Mapping[str, float], step: int, checkpoint: Path | None = None) -> None:
    """Raises `TrainingDivergedError` if one of the `losses` of `step` is NaN or infinite.

    Args:
        losses: Term to value.
        step: For the message, from 1.
        checkpoint: The last checkpoint, which is good since it was written after such a check; None if there is none.
    """
    broken = {name: value for name, value in losses.items() if not math.isfinite(value)}
    if broken:
        terms = ", ".join(f"{name} = {value}" for name, value in broken.items())
        last = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was written before."
        raise TrainingDivergedError(
            f"Training stopped at step {step}: {terms}. Lower the learning rate, or train in fp32 "
            f'(`mixed_precision="no"`). {last}'
        )


def check_step_settings(config: Any) -> None:
    """Checks the fields that every training config has; Raises: ValueError with the field, its value and the remedy."""
    for field in ("steps", "batch_size"):
        if getattr(config, field) < 1:
            raise MoLEError(f"`{field}` must be at least 1, got {getattr(config, field)}.")
    for field in ("warmup_steps", "checkpoint_every"):
        if getattr(config, field) < 0:
            raise MoLEError(f"`{field}` must be 0 (off) or more, got {getattr(config, field)}.")
    if config.warmup_steps >= config.steps:
        raise MoLEError(f"`warmup_steps` ({config.warmup_steps}) must be fewer than `steps` ({config.steps}).")
    for field in ("learning_rate", "max_grad_norm"):
        if not (math.isfinite(getattr(config, field)) and getattr(config, field) > 0):
            raise MoLEError(f"`{field}` must be positive and finite, got {getattr(config, field)}.")
    if not (math.isfinite(config.weight_decay) and config.weight_decay >= 0):
        raise MoLEError(f"`weight_decay` must be 0 or more, got {config.weight_decay}.")
    if config.mixed_precision not in ("no", "fp16", "bf16"):
        raise MoLEError(f'`mixed_precision` must be "no", "fp16" or "bf16", got {config.mixed_precision!r}.')


def peak_memory(device: torch.device) -> float | None:
    """GiB: the most that tensors took on a GPU since the process started, elsewhere the process's resident memory.

    None on systems that do not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def make_optimizer(parameters: list[Tensor], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW in one fused kernel, which matters with hundreds of small LoRA factors."""
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)
