"""What a scheduler of diffusers does to pictures, as every training here asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mole_diffusion.training.engine.flow import FlowSchedule
from mole_diffusion.training.engine.noise import NoiseSchedule


class Schedule(Protocol):
    """How pictures become noise, and how a model's prediction leads back.

    `NoiseSchedule` is that of the DDPM family, `FlowSchedule` that of flow matching. Latents are (batch, ...), and
    timesteps are in the scheduler's units, (batch,).
    """

    @property
    def clean(self) -> float:
        """The timestep of a picture without noise."""
        ...

    def trailing_timesteps(self, steps: int) -> Sequence[float]:
        """That many timesteps from the noisiest downwards, as diffusers' `timestep_spacing="trailing"`."""
        ...

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps to train a model at, (count,)."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean latents as noisy as they are at `timesteps`."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a model should predict where `noise` was added to clean `latents`."""
        ...

    def predict_clean(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents `x_0` as the model's `prediction` at `noisy` means them."""
        ...

    def step(
        self,
        prediction: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        next_timesteps: Tensor,
        fresh_noise: Tensor | None = None,
        eta: float = 0.0,
    ) -> Tensor:
        """The latents at `next_timesteps` from `noisy` at `timesteps`.

        Args:
            prediction: The model's, at `noisy`.
            noisy: The latents now.
            timesteps: The timesteps of `noisy`.
            next_timesteps: The timesteps of the result; `clean` is the finished picture.
            fresh_noise: Mixed in as `eta` says, shaped like `noisy`.
            eta: 0 is deterministic, 1 draws all noise anew.
        """
        ...


def schedule_of(scheduler: Any, shift: float | None = None) -> Schedule:
    """Reads what a scheduler does to pictures.

    Args:
        scheduler: A scheduler of diffusers.
        shift: The shift of a call, for a flow-matching scheduler that takes it from the size of the picture.

    Raises:
        MoLEError: The scheduler is neither of the DDPM family nor of flow matching.
    """
    config = scheduler.config
    if "shift" in config and hasattr(scheduler, "scale_noise"):
        return FlowSchedule(config.num_train_timesteps, config.shift if shift is None else shift)
    return NoiseSchedule.from_scheduler(scheduler)
