"""What one gate training does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mole_diffusion.errors import MoLEError
from mole_diffusion.gating import GateConfig
from mole_diffusion.training.engine.settings import (
    LearningRateSchedule,
    MixedPrecision,
    check_step_settings,
    check_types,
)
from mole_diffusion.training.gates.presets import PRESETS

LossShape = Literal["linear", "log"]
Balance = Literal["uniform", "floor", "off"]
Picture = Literal["clean", "noisy"]


@dataclass(frozen=True, kw_only=True)
class GateTrainingConfig:
    """What one gate training does; the same config, prompts, concepts, LoRAs, base and CLIP give the same gates.

    Args:
        gates: Which gates: scope, token axis, input, normalisation, temperature.
        global_weight: Weight of `1 - cos(picture, prompt)`.
        local_weight: Weight of the directional loss `1 - cos(dI, dT)`, a mean over the concepts the prompt calls:
            from the concept's own pictures and words to the drawn picture and the whole prompt. Needs `concepts`.
        identity_weight: Weight of `1 - max cos(crop, reference)`, a mean over the concepts the prompt calls. Needs
            `concepts`.
        identity_crops: Crops per side, each half as wide as the picture; k x k in all.
        loss_shape: "linear": the weighted sum of the terms. "log": `-log((2.5 - sum) / 2)`, as in the released code,
            which is NaN there for a sum of 2.5; here the logarithm's argument is at least 0.01.
        balance: "uniform": the paper's loss (14), lowest at equal use. "floor": only a LoRA that falls under the share
            `balance_floor` is lifted. "off".
        balance_weight: The paper's alpha in eq. 16, the weight of the balance loss.
        balance_floor: The least share of a LoRA; 1 / N at most.
        rollout_steps: Steps of the schedule that training walks on, from noise down.
        rollout_steps_max: If given, the number of steps is drawn for each walk from `rollout_steps` to this.
        gradient_steps: At how many steps of a walk, drawn anew for each, the loss is taken; 0 is at every step. The
            latents are detached between steps, and a walk ends with the last of them.
        update_every: Losses after which the optimiser steps, within a walk; 0 is once, at the walk's end.
        picture: What CLIP sees: "clean", the prediction of the final picture, or "noisy", the next latents as they are.
        eta: Fresh noise in a denoising step: 0 is DDIM, 1 is DDPM's ancestral sampling.
        guidance_scale: Classifier-free guidance while walking and at the gradient; 1 is none, and twice as fast.
        steps: Walks, which are optimiser steps unless `update_every` makes them more.
        batch_size: Pictures a walk, over all processes and accumulated parts.
        gradient_accumulation: Parts a batch is run in, one after another, to save memory. The result is the same.
        learning_rate: Peak of the learning rate, after `warmup_steps`.
        learning_rate_schedule: After the warm-up: "cosine" decays to zero, "constant" stays.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Weight decay of AdamW.
        max_grad_norm: Gradients are clipped to this norm, in all.
        mixed_precision: "no", "bf16", or (on a GPU) "fp16"; gates compute in fp32 always.
        resolution: Side of the square pictures that are drawn in training, in pixels; None is the base's own. Gates
            with token_axis="flatten" fit this one alone afterwards, others any.
        gradient_checkpointing: Recompute UNet and VAE in the backward pass: less memory, about a third slower.
        reference_pictures: How many pictures a LoRA draws of its concept where references are needed and not given.
        checkpoint_every: Steps between checkpoints when a work folder is given; 0 writes one at the end only.
        seed: Seed of prompts, noise, walks and drawn references.

    Raises:
        MoLEError: A value is out of range.
    """

    gates: GateConfig = field(default_factory=lambda: GateConfig(**PRESETS["default"]["gates"]))
    global_weight: float = 1.0
    local_weight: float = 0.0
    identity_weight: float = 0.5
    identity_crops: int = 3
    loss_shape: LossShape = "linear"
    balance: Balance = "off"
    balance_weight: float = 0.5
    balance_floor: float = 0.1
    rollout_steps: int = 8
    rollout_steps_max: int | None = None
    gradient_steps: int = 1
    update_every: int = 0
    picture: Picture = "clean"
    eta: float = 0.0
    guidance_scale: float = 5.0
    steps: int = 40
    batch_size: int = 4
    gradient_accumulation: int = 1
    learning_rate: float = 1e-2
    learning_rate_schedule: LearningRateSchedule = "cosine"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mixed_precision: MixedPrecision = "no"
    resolution: int | None = None
    gradient_checkpointing: bool = False
    reference_pictures: int = 4
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("global_weight", "local_weight", "identity_weight", "balance_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                hint = " The paper takes 0.5." if name == "balance_weight" else " 0 switches the term off."
                raise MoLEError(f"`{name}` must be 0 or more, got {value}.{hint}")
        if self.global_weight == self.local_weight == self.identity_weight == 0:
            raise MoLEError(
                "`global_weight`, `local_weight` and `identity_weight` are all 0: nothing says what the pictures "
                "should show. Set one of them, for instance global_weight=1.0."
            )
        for name, allowed in (
            ("loss_shape", LossShape),
            ("balance", Balance),
            ("picture", Picture),
            ("learning_rate_schedule", LearningRateSchedule),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise MoLEError(f"`{name}` must be one of {list(get_args(allowed))}, got {getattr(self, name)!r}.")
        for name in ("rollout_steps", "gradient_accumulation", "identity_crops", "reference_pictures"):
            if getattr(self, name) < 1:
                raise MoLEError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("gradient_steps", "update_every"):
            if getattr(self, name) < 0:
                raise MoLEError(f"`{name}` must be 0 (all) or more, got {getattr(self, name)}.")
        if self.gradient_steps > self.rollout_steps:
            raise MoLEError(
                f"`gradient_steps` ({self.gradient_steps}) must be at most `rollout_steps` ({self.rollout_steps}); "
                "0 is every step."
            )
        if self.rollout_steps_max is not None and self.rollout_steps_max < self.rollout_steps:
            raise MoLEError(
                f"`rollout_steps_max` ({self.rollout_steps_max}) must be at least `rollout_steps` "
                f"({self.rollout_steps}), or None for a fixed number."
            )
        if self.gates.residual and self.balance != "off":
            raise MoLEError(
                f"gates with residual=True correct masks and share nothing out, so there is no balance to keep; got "
                f'balance={self.balance!r}. Use balance="off".'
            )
        if self.resolution is not None and (self.resolution < 8 or self.resolution % 8):
            raise MoLEError(f"`resolution` must be a multiple of 8 pixels, or None, got {self.resolution}. Try 512.")
        if not 0 < self.balance_floor < 1:
            raise MoLEError(f"`balance_floor` must lie between 0 and 1, got {self.balance_floor}. Try 0.1.")
        if not 0 <= self.eta <= 1:
            raise MoLEError(f"`eta` must lie between 0 (DDIM) and 1 (DDPM), got {self.eta}.")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 1):
            raise MoLEError(f"`guidance_scale` must be at least 1 (no guidance), got {self.guidance_scale}.")
        check_step_settings(self)
        if self.batch_size % self.gradient_accumulation:
            raise MoLEError(
                f"`batch_size` ({self.batch_size}) must be a multiple of `gradient_accumulation` "
                f"({self.gradient_accumulation}), so that its parts are equal."
            )

    @property
    def picture_guidance_scale(self) -> float:
        """Guidance of pictures drawn to be looked at, CLIP's references and the report's: that of training.

        Training without guidance saves time; a picture without it shows little, so then it is 5.
        """
        return self.guidance_scale if self.guidance_scale > 1 else 5.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], preset: str = "default") -> GateTrainingConfig:
        """A preset with changes, as YAML or a command line give them; `gates` is a dictionary of changes too.

        Args:
            values: Field to value. Numbers may be strings, since YAML takes "1e-5" for one.
            preset: "default", "real", "masks", "paper" or "official"; an entry `preset` of `values` goes before it.

        Raises:
            MoLEError: The preset or a key is unknown, or a value is of another kind or out of range.
        """
        preset = str(values.get("preset", preset))
        if preset not in PRESETS:
            raise MoLEError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}.")
        base = PRESETS[preset]
        gates = values.get("gates") or {}
        if not isinstance(gates, Mapping):
            raise MoLEError(f"`gates` must be a dictionary such as {{'scope': 'layer'}}, got {gates!r}.")
        own = {**base, **{key: value for key, value in values.items() if key not in ("preset", "gates")}}
        own.pop("gates", None)
        gate_config = GateConfig(**read_fields(GateConfig, {**base.get("gates", {}), **gates}))
        return cls(**read_fields(cls, own), gates=gate_config)


def read_fields(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` for a config dataclass: keys checked, and strings that stand for floats read.

    Raises:
        MoLEError: A key is unknown, or such a string is no number.
    """
    fields: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(config)}
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise MoLEError(f"unknown settings {unknown} in {config.__name__}; known are {', '.join(sorted(fields))}.")
    read = dict(values)
    for name, value in values.items():
        if isinstance(fields[name], float) and isinstance(value, int | str) and not isinstance(value, bool):
            try:
                read[name] = float(value)
            except (ValueError, OverflowError):  # a whole number with more digits than a float has
                raise MoLEError(f"`{name}` must be of type float, such as {fields[name]}, got {value!r}.") from None
    return read
