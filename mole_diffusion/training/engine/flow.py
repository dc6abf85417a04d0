"""Flow matching, as training needs it: noise in, the clean latents out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", float, Tensor)


@dataclass(frozen=True)
class FlowSchedule:
    """`x_s = (1 - s) x_0 + s eps` for s from 0 (clean) to 1 (noise), read from a flow-matching scheduler.

    "Flow Matching for Generative Modeling" (arXiv 2210.02747) with straight paths; the model predicts `eps - x_0`. A
    timestep is `1000 s` for a scheduler of 1000 training timesteps.

    Args:
        num_timesteps: T.
        shift: By which noise levels are moved towards noise, `shift s / (1 + (shift - 1) s)`.
    """

    num_timesteps: int
    shift: float
    clean: ClassVar[float] = 0.0
    """The timestep of a picture without noise."""

    def trailing_timesteps(self, steps: int) -> list[float]:
        """`steps` timesteps from T downwards: evenly spaced noise levels, shifted."""
        levels = [1 - k / steps for k in range(steps)]
        return [self._shifted(s) for s in levels]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps to train at, (count,): shifted as in a call, so that every step of a call is as likely."""
        return self._shifted(1 - torch.rand(count, generator=generator))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`x_s` of clean `latents` (batch, ...) at `timesteps` (batch,)."""
        level = self._level(timesteps, latents)
        return (1 - level) * latents + level * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict at any timestep: `eps - x_0`."""
        return noise - latents

    def predict_clean(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """`x_0` as the model's `prediction` at `noisy` means it."""
        return noisy - self._level(timesteps, noisy) * prediction

    def step(
        self,
        prediction: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        next_timesteps: Tensor,
        fresh_noise: Tensor | None = None,
        eta: float = 0.0,
    ) -> Tensor:
        """`Schedule.step` by one Euler step along the straight path.

        With `eta` the path is not followed but left for a new one: from the predicted `x_0` to noise of which a part
        `eta` is fresh, as in `NoiseSchedule.step`.
        """
        level, after = self._level(timesteps, noisy), self._level(next_timesteps, noisy)
        if fresh_noise is None or eta == 0:
            return noisy + (after - level) * prediction
        clean = self.predict_clean(prediction, noisy, timesteps)
        noise = (1 - eta**2) ** 0.5 * (clean + prediction) + eta * fresh_noise
        return (1 - after) * clean + after * noise

    def _shifted(self, level: T) -> T:
        """The timestep of a noise level from 0 to 1, after the shift."""
        return self.num_timesteps * self.shift * level / (1 + (self.shift - 1) * level)

    def _level(self, timesteps: Tensor, like: Tensor) -> Tensor:
        level = timesteps.to(like.device, torch.float32) / self.num_timesteps
        return level.view(-1, *[1] * (like.ndim - 1)).to(like.dtype)
