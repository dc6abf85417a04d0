"""What one LoRA training does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mole_diffusion.errors import MoLEError
from mole_diffusion.training.engine.settings import MixedPrecision, check_step_settings, check_types


@dataclass(frozen=True, kw_only=True)
class LoRATrainingConfig:
    """What one LoRA training does; the same config, pictures and base give the same LoRA.

    Args:
        captions: One caption per picture, with the rare token in it. Give these or `prompts`.
        prompts: Captions that fit every picture; one is drawn for each sample.
        triggers: What calls the subject in them, e.g. ("<v1> cat",); the LoRA's file names it, for compositions that
            bind a LoRA to its words. Every caption or prompt must have one.
        rank: r of every factor pair.
        alpha: Scaling is `alpha / rank`; None is alpha = rank, scaling 1.
        denoiser_targets: Last parts of the names of the modules to train in the UNet or transformer. None: those of
            its family, attention and in most the feed-forward. In a UNet add "proj_in" and "proj_out" to `UNET_TARGETS`
            for the projections around the transformer blocks. Empty leaves the denoiser alone.
        text_encoder_targets: The same for the text encoder; empty (the default) leaves it alone, `TEXT_ENCODER_TARGETS`
            trains the attention and feed-forward of a CLIP.
        text_encoder_2_targets: The same for the second. None: as for the first, where both are CLIPs.
        steps: Optimiser steps.
        batch_size: Samples a step, spread over the pictures.
        learning_rate: Peak of AdamW's, after `warmup_steps`, before a cosine decay to zero.
        warmup_steps: Steps of linear warm-up.
        weight_decay: AdamW's.
        max_grad_norm: Gradients are clipped to this norm, in all.
        horizontal_flip: Mirror half the samples. Off, since most looks are not symmetric.
        resolution: Side of the square training pictures in pixels, whole tokens; None is the base model's own;
            "native" leaves every picture the size and shape it has, cut to whole tokens, and a batch holds pictures of
            one size. Denoisers that are given latents as a row of patches take squares only.
        mixed_precision: "no", "bf16", or (on a GPU) "fp16".
        checkpoint_every: Steps between checkpoints when a work folder is given; 0 writes one at the end only.
        seed: Seed of the starting factors and of every sample.

    Raises:
        MoLEError: A value is out of range, or captions and prompts are both given or both missing.
        TypeError: Captions, prompts or targets are one string and not a sequence of them.
    """

    captions: Sequence[str] = ()
    prompts: Sequence[str] = ()
    triggers: Sequence[str] = ()
    rank: int = 8
    alpha: float | None = None
    denoiser_targets: Sequence[str] | None = None
    text_encoder_targets: Sequence[str] = ()
    text_encoder_2_targets: Sequence[str] | None = None
    steps: int = 500
    batch_size: int = 4
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    horizontal_flip: bool = False
    resolution: int | Literal["native"] | None = None
    mixed_precision: MixedPrecision = "no"
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        targets = ("denoiser_targets", "text_encoder_targets", "text_encoder_2_targets")
        for field in ("captions", "prompts", "triggers", *targets):
            value = getattr(self, field)
            if value is None and field in targets:
                continue
            if isinstance(value, str):
                raise TypeError(f"`{field}` must be a sequence of strings, got the string {value!r}. Try ({value!r},).")
            object.__setattr__(self, field, tuple(value))
        if bool(self.captions) == bool(self.prompts):
            raise MoLEError(
                f"Give either `captions` (one per picture) or `prompts` (for every picture), got {len(self.captions)} "
                f"captions and {len(self.prompts)} prompts."
            )
        if not all(text.strip() for text in (*self.captions, *self.prompts)):
            raise MoLEError("One of `captions` or `prompts` is empty. Each must name the subject by its token.")
        for text in (*self.captions, *self.prompts) if self.triggers else ():
            if not any(trigger.strip() and trigger.lower() in text.lower() for trigger in self.triggers):
                raise MoLEError(
                    f"{text!r} has none of `triggers`, {', '.join(map(repr, self.triggers))}. Give the words that call "
                    "the subject in every caption or prompt, or no triggers."
                )
        if self.denoiser_targets == () and not self.text_encoder_targets and not self.text_encoder_2_targets:
            raise MoLEError("`denoiser_targets` and those of the text encoders are empty: there is nothing to train.")
        if self.rank < 1:
            raise MoLEError(f"`rank` must be at least 1, got {self.rank}.")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise MoLEError(f"`alpha` must be positive and finite, or None for alpha = rank, got {self.alpha}.")
        if isinstance(self.resolution, str) and self.resolution != "native":
            raise MoLEError(f'`resolution` must be a number of pixels, None or "native", got {self.resolution!r}.')
        if isinstance(self.resolution, int) and (self.resolution < 8 or self.resolution % 8):
            raise MoLEError(
                f"`resolution` must be a multiple of 8 pixels, or None for the base's own, got {self.resolution}. "
                "Try 512."
            )
        check_step_settings(self)
