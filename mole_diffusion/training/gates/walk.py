"""A walk down the noise schedule, as gate training takes it: from noise towards a picture, gradients on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.errors import MoLEError
from mole_diffusion.families.base import Conditions, Family
from mole_diffusion.training.engine.schedule import schedule_of
from mole_diffusion.training.gates.config import GateTrainingConfig


@dataclass(frozen=True)
class WalkPlan:
    """What one walk was drawn to be; the same in every process, for the whole batch.

    Attributes:
        timesteps: Where the denoiser is asked, and in the end that of a clean picture.
        gradient_at: Indices of `timesteps` at which the loss is taken, rising; the walk ends after the last.
        noise: The starting latents, (batch, ...), fp32 on the CPU.
        generator: Draws the fresh noise of ancestral steps.
    """

    timesteps: tuple[float, ...]
    gradient_at: tuple[int, ...]
    noise: Tensor
    generator: torch.Generator

    def fresh_noise(self, eta: float) -> Tensor | None:
        """New noise for one step of the whole batch, or None where none is needed."""
        return torch.randn(self.noise.shape, generator=self.generator) if eta else None

    def losses_in_update(self, index: int, update_every: int) -> int:
        """How many losses share the optimiser step that the loss at `index` of the walk goes into."""
        first, end = self._update_of(index, update_every)
        return end - first

    def ends_update(self, index: int, update_every: int) -> bool:
        """Whether the optimiser steps after the loss at `index`: the last of its update, or of the walk."""
        return self.gradient_at.index(index) + 1 == self._update_of(index, update_every)[1]

    def _update_of(self, index: int, update_every: int) -> tuple[int, int]:
        """First loss of an update and the one after its last, counted along the walk; 0 is one update for all."""
        place, total = self.gradient_at.index(index), len(self.gradient_at)
        size = update_every or total
        first = place - place % size
        return first, min(first + size, total)


class Walker:
    """Asks the models of `pipe` on behalf of one training.

    Args:
        pipe: A composing pipeline with gates on it.
        config: How to walk.

    Raises:
        MoLEError: The scheduler is neither of the DDPM family nor of flow matching.
        MoLEError: The model cannot be trained at another resolution than its own.
    """

    def __init__(self, pipe: Any, config: GateTrainingConfig) -> None:
        self.pipe = pipe
        self.config = config
        self.family: Family = pipe.family
        self.denoiser: Any = getattr(pipe, self.family.denoiser)
        self.latent_shape = self._latent_shape()
        self.schedule = schedule_of(pipe.scheduler, self.family.shift(pipe))

    def _latent_shape(self) -> tuple[int, ...]:
        """What is drawn, as the denoiser is given it."""
        own, pixels = self.family.latent_shape(self.pipe), self.config.resolution
        if pixels is None:
            return own
        told = getattr(self.denoiser.config, "addition_embed_type", None) == "text_time"
        if len(own) != 3 or told:
            why = "is told the size of the picture" if told else "takes latents as a sequence"
            raise MoLEError(
                f"gates of a {type(self.pipe).__name__} are trained at the base's own size only, for its denoiser "
                f"{why}. Leave `resolution` at None."
            )
        self.family.refuse_cut(self.pipe, pixels)
        side = pixels // self.pipe.vae_scale_factor
        return own[0], side, side

    def plan(self, generator: torch.Generator) -> WalkPlan:
        """Draws the number of steps, those with a gradient, and the noise."""
        config = self.config
        steps = config.rollout_steps
        if config.rollout_steps_max is not None:
            steps = int(torch.randint(steps, config.rollout_steps_max + 1, (), generator=generator))
        # Gates that correct masks say nothing before LoRAs join in.
        first = self.pipe.composition.joins(steps) if config.gates.residual else 0
        order = first + torch.randperm(steps - first, generator=generator)
        gradient_at = sorted(order[: config.gradient_steps or steps].tolist())
        noise = torch.randn((config.batch_size, *self.latent_shape), generator=generator)
        timesteps = (*self.schedule.trailing_timesteps(steps), self.schedule.clean)
        return WalkPlan(timesteps, tuple(gradient_at), noise, generator)

    def encode(self, prompts: list[str]) -> Conditions:
        """What the denoiser is told of prompts, after what it is told of the empty one where there is guidance.

        Both in one pass of the text encoders, so that their gates are recorded for both.
        """
        empty = [""] * len(prompts) if self.config.guidance_scale > 1 else []
        return self.family.conditions(self.pipe, empty + prompts)

    def predict(self, noisy: Tensor, timestep: float, conditions: Conditions) -> Tensor:
        """The denoiser's prediction under classifier-free guidance, fp32."""
        dtype = self.denoiser.dtype
        copies = len(conditions.prompt_embeds) // len(noisy)
        timesteps = torch.full((copies * len(noisy),), timestep, device=noisy.device)
        told = Conditions(conditions.prompt_embeds.to(dtype), conditions.others)
        prediction = self.family.predict(self.pipe, torch.cat([noisy] * copies).to(dtype), timesteps, told).float()
        if copies == 1:
            return prediction
        unconditional, conditional = prediction.chunk(2)
        return unconditional + self.config.guidance_scale * (conditional - unconditional)

    def advance(
        self, prediction: Tensor, noisy: Tensor, timestep: float, next_timestep: float, fresh_noise: Tensor | None
    ) -> Tensor:
        """The latents at `next_timestep`."""
        now = torch.full((len(noisy),), timestep)
        fresh_noise = None if fresh_noise is None else fresh_noise.to(noisy.device)
        return self.schedule.step(
            prediction, noisy, now, torch.full_like(now, next_timestep), fresh_noise, self.config.eta
        )

    def picture_latents(self, prediction: Tensor, noisy: Tensor, timestep: float, next_latents: Tensor) -> Tensor:
        """What CLIP is to see: the prediction of the clean latents, or the next latents as they are."""
        if self.config.picture == "noisy":
            return next_latents
        return self.schedule.predict_clean(prediction, noisy, torch.full((len(noisy),), timestep))

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (batch, 3, height, width) in [0, 1] of latents, with graph."""
        return (self.family.picture(self.pipe, latents).float() / 2 + 0.5).clamp(0, 1)
