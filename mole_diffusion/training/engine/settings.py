"""The settings that every training has, checked."""

from __future__ import annotations

import dataclasses
import math
from numbers import Integral, Real
from typing import Any, Literal, get_args

from mole_diffusion.errors import MoLEError

LearningRateSchedule = Literal["cosine", "constant"]
MixedPrecision = Literal["no", "fp16", "bf16"]
MOST_STEPS = 10**9  # more than anybody takes, and few enough to count with
LARGEST_SIDE = 2**14  # pixels
LEAST_RATE = 1e-12  # less changes no number that is trained
_KINDS: dict[str, type] = {"int": Integral, "float": Real, "bool": bool}


def check_types(config: Any) -> None:
    """Checks that numbers are numbers: whole ones where the field's type is `int`, and true or false where `bool`.

    Raises:
        MoLEError: A field is of another type; the message has the field, its value and an example.
    """
    for field in dataclasses.fields(config):
        allowed = str(field.type).split(" | ")
        value, kind = getattr(config, field.name), _KINDS.get(allowed[0])
        or_a_word = any(one.startswith("Literal") for one in allowed) and isinstance(value, str)
        if kind is None or or_a_word or (value is None and "None" in allowed):
            continue
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or _too_long(value):
            also = " or None" if "None" in allowed else f", such as {field.default}"
            raise MoLEError(f"`{field.name}` must be of type {allowed[0]}{also}, got {value!r}.")


def _too_long(value: Any) -> bool:
    """Whether a whole number has more digits than a float."""
    try:
        float(value)
    except OverflowError:
        return True
    return False


def check_step_settings(config: Any) -> None:
    """Checks the fields that every training config has.

    Raises:
        MoLEError: One is out of range; the message has the field, its value and the remedy.
    """
    if not 0 <= config.seed < 2**63:
        raise MoLEError(f"`seed` must be 0 or more, and less than 2**63, got {config.seed}.")
    for field in ("steps", "batch_size"):
        if getattr(config, field) < 1:
            raise MoLEError(f"`{field}` must be at least 1, got {getattr(config, field)}.")
        if getattr(config, field) > MOST_STEPS:
            raise MoLEError(f"`{field}` must be at most {MOST_STEPS:,}, got {getattr(config, field)}.")
    if isinstance(config.resolution, int) and config.resolution > LARGEST_SIDE:
        raise MoLEError(f"`resolution` must be at most {LARGEST_SIDE} pixels, got {config.resolution}.")
    for field in ("warmup_steps", "checkpoint_every"):
        if getattr(config, field) < 0:
            raise MoLEError(f"`{field}` must be 0 (off) or more, got {getattr(config, field)}.")
    if config.warmup_steps >= config.steps:
        raise MoLEError(f"`warmup_steps` ({config.warmup_steps}) must be fewer than `steps` ({config.steps}).")
    for field in ("learning_rate", "max_grad_norm"):
        if not (math.isfinite(getattr(config, field)) and getattr(config, field) > 0):
            raise MoLEError(f"`{field}` must be positive and finite, got {getattr(config, field)}.")
    if config.learning_rate < LEAST_RATE:
        raise MoLEError(
            f"`learning_rate` must be at least {LEAST_RATE:g}, got {config.learning_rate}: with less nothing is learnt."
        )
    if not (math.isfinite(config.weight_decay) and config.weight_decay >= 0):
        raise MoLEError(f"`weight_decay` must be 0 or more, got {config.weight_decay}.")
    if config.mixed_precision not in get_args(MixedPrecision):
        raise MoLEError(f'`mixed_precision` must be "no", "fp16" or "bf16", got {config.mixed_precision!r}.')
