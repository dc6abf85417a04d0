"""The forward diffusion of a scheduler, as training needs it: noise in, the model's target, the clean latents out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mole_diffusion.errors import MoLEError

PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class NoiseSchedule:
    """`x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps`, read from a diffusers scheduler.

    Taken from `alphas_cumprod`, which all variance-preserving schedulers share and which has the zero terminal SNR in
    it; their `add_noise` does not agree on scales.

    Args:
        alphas_cumprod: `a_t`, fp32 of shape `(T,)`.
        prediction_type: "epsilon" or "v_prediction".
    """

    alphas_cumprod: Tensor
    prediction_type: str
    clean: ClassVar[int] = -1
    """The timestep of a picture without noise."""

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """Reads any scheduler of the DDPM family.

        Raises:
            MoLEError: It is of flow matching, or its model predicts something else than noise or v.
        """
        name = type(scheduler).__name__
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None:
            raise MoLEError(
                f"{name} has no `alphas_cumprod`, so its noise is not known to this training. Set one of the DDPM "
                "family before training, for instance DDIMScheduler.from_config(pipe.scheduler.config)."
            )
        prediction_type = scheduler.config.prediction_type
        if prediction_type not in PREDICTION_TYPES:
            raise MoLEError(f"{name} has prediction_type {prediction_type!r}; training knows {PREDICTION_TYPES}.")
        return cls(alphas_cumprod.float().cpu(), prediction_type)

    @property
    def num_timesteps(self) -> int:
        """T; timesteps are 0 … T-1."""
        return len(self.alphas_cumprod)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps to train at, (count,): every one as likely."""
        return torch.randint(self.num_timesteps, (count,), generator=generator)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`x_t` of clean `latents` (batch, c, h, w) at `timesteps` (batch,)."""
        signal, sigma = self._scales(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet should predict at `timesteps`: the noise, or `v = sqrt(a_t) eps - sqrt(1 - a_t) x_0`."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._scales(timesteps, latents)
        return signal * noise - sigma * latents

    def predict_clean(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """`x_0` as the UNet's `prediction` at `noisy` = `x_t` means it.

        Raises:
            MoLEError: An epsilon prediction at a timestep without signal (`a_t` = 0) says nothing about `x_0`.
        """
        signal, sigma = self._scales(timesteps, noisy)
        if self.prediction_type == "v_prediction":
            return signal * noisy - sigma * prediction
        if bool((signal == 0).any()):
            raise MoLEError(
                'prediction_type "epsilon" at a timestep of zero SNR says nothing about the clean picture; '
                'use a scheduler with prediction_type "v_prediction".'
            )
        return (noisy - sigma * prediction) / signal

    def trailing_timesteps(self, steps: int) -> list[int]:
        """`steps` timesteps from T-1 downwards, evenly spaced, as diffusers' `timestep_spacing="trailing"`."""
        return [round(self.num_timesteps * (steps - k) / steps) - 1 for k in range(steps)]

    def step(
        self,
        prediction: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        next_timesteps: Tensor,
        fresh_noise: Tensor | None = None,
        eta: float = 0.0,
    ) -> Tensor:
        """`Schedule.step` by eqs. 12 and 16 of DDIM (arXiv 2010.02502); `eta` = 1 is DDPM's ancestral step."""
        clean = self.predict_clean(prediction, noisy, timesteps)
        signal, sigma = self._scales(timesteps, noisy)
        next_signal, next_sigma = self._scales(next_timesteps, noisy)
        old_noise = (noisy - signal * clean) / sigma
        if fresh_noise is None or eta == 0:
            return next_signal * clean + next_sigma * old_noise
        fresh = eta * next_sigma / sigma * (1 - (signal / next_signal) ** 2).clamp_min(0).sqrt()
        return next_signal * clean + (next_sigma**2 - fresh**2).clamp_min(0).sqrt() * old_noise + fresh * fresh_noise

    def _scales(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """`sqrt(a_t)` and `sqrt(1 - a_t)`, each (batch, 1, 1, 1) beside `like`."""
        without_noise = self.alphas_cumprod.new_ones(1)  # what index -1 finds
        alphas = torch.cat([self.alphas_cumprod, without_noise])[timesteps.cpu()].view(-1, *[1] * (like.ndim - 1))
        scales = torch.stack([alphas.sqrt(), (1 - alphas).sqrt()]).to(like.device, like.dtype)
        return scales[0], scales[1]
