"""Pictures and captions as a LoRA training samples them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mole_diffusion.errors import MoLEError
from mole_diffusion.pictures import as_seen
from mole_diffusion.training.lora.config import LoRATrainingConfig


class TrainingData:
    """Latent distributions of the pictures, and text embeddings: encoded once, sampled every step."""

    def __init__(self, pipe: Any, groups: Sequence[tuple[Tensor, Tensor]], config: LoRATrainingConfig) -> None:
        self._pipe = pipe
        self._config = config
        self._prompts = list(config.captions or config.prompts)
        with torch.no_grad():
            self._groups = [(numbers, *self._distribution(pixels)) for numbers, pixels in groups]
            # Without a trained text encoder the embeddings never change: (prompts, tokens, width).
            self._embeds = None if config.text_encoder_targets else self._encode(self._prompts)

    def _distribution(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of pictures of one size, then of the mirrored ones."""
        vae = self._pipe.vae
        views = [pixels, pixels.flip(-1)] if self._config.horizontal_flip else [pixels]
        encoded = [vae.encode(view[None].to(vae.device, vae.dtype)).latent_dist for group in views for view in group]
        mean = torch.cat([distribution.mean for distribution in encoded]).float()
        return mean, torch.cat([distribution.std for distribution in encoded]).float()

    def _encode(self, prompts: list[str]) -> Tensor:
        return self._pipe.encode_prompt(prompts, self._pipe.unet.device, 1, False)[0]

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents (batch, c, h, w) in the UNet's scale, and prompt embeddings (batch, tokens, width), of one batch."""
        config, vae = self._config, self._pipe.vae
        group = 0
        if len(self._groups) > 1:  # as often as there are pictures of the size
            shares = torch.tensor([float(len(numbers)) for numbers, _, _ in self._groups])
            group = int(torch.multinomial(shares, 1, generator=generator))
        numbers, mean, std = self._groups[group]
        count = len(numbers)
        # Shuffled rounds: no picture comes twice in a batch before every picture came once.
        rounds = math.ceil(config.batch_size / count)
        pictures = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[: config.batch_size]
        if config.captions:
            texts = numbers[pictures]
        else:
            texts = torch.randint(len(self._prompts), (config.batch_size,), generator=generator)
        if config.horizontal_flip:
            pictures = pictures + count * torch.randint(2, (config.batch_size,), generator=generator)
        noise = torch.randn(config.batch_size, *mean.shape[1:], generator=generator)
        pictures = pictures.to(mean.device)
        latents = mean[pictures] + std[pictures] * noise.to(mean.device)
        latents = (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
        if self._embeds is not None:
            return latents, self._embeds[texts.to(self._embeds.device)]
        distinct, places = texts.unique(return_inverse=True)
        embeds = self._encode([self._prompts[index] for index in distinct.tolist()])
        return latents, embeds[places.to(embeds.device)]


def groups_by_size(
    images: Sequence[Image.Image], size: int | Literal["native"], pipe: Any
) -> list[tuple[Tensor, Tensor]]:
    """Numbers of the pictures of each size, and these as (n, 3, height, width) in [-1, 1], cut around the centre."""
    by_size: dict[tuple[int, int], list[int]] = {}
    upright = [as_seen(image) for image in images]
    for number, image in enumerate(upright):
        if size == "native":
            width, height = (side // pipe.vae_scale_factor * pipe.vae_scale_factor for side in image.size)
            if min(width, height) < 8:
                raise MoLEError(f"A picture of {image.width}×{image.height} pixels is too small to train on.")
        else:
            width = height = size
        by_size.setdefault((width, height), []).append(number)
    groups = []
    for (width, height), numbers in by_size.items():
        cut = [ImageOps.fit(upright[k], (width, height), Image.Resampling.LANCZOS) for k in numbers]
        stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in cut]))  # (n, height, width, 3)
        groups.append((torch.tensor(numbers), stacked.permute(0, 3, 1, 2).float() / 127.5 - 1))
    return groups
