"""The settings that every training has, checked."""

from __future__ import annotations

import math
from typing import Any

from mole_diffusion.errors import MoLEError


def check_step_settings(config: Any) -> None:
    """Checks the fields that every training config has.

    Raises:
        MoLEError: One is out of range; the message has the field, its value and the remedy.
    """
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
