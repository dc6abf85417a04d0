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
from mole_diffusion.families.base import Conditions, Family
from mole_diffusion.pictures import as_seen
from mole_diffusion.training.lora.config import LoRATrainingConfig


class TrainingData:
    """Latent distributions of the pictures and conditions of the prompts: encoded once, sampled every step.

    Args:
        pipe: The pipeline.
        family: The family that it is of.
        groups: The pictures, as `groups_by_size` gives them.
        config: What the training does.
        encode_once: Whether no text encoder is trained, so that the prompts' embeddings never change.
    """

    def __init__(
        self,
        pipe: Any,
        family: Family,
        groups: Sequence[tuple[Tensor, Tensor]],
        config: LoRATrainingConfig,
        *,
        encode_once: bool = True,
    ) -> None:
        self._pipe = pipe
        self._family = family
        self._config = config
        self._prompts = list(config.captions or config.prompts)
        with torch.no_grad():
            self._groups = [(numbers, *self._distribution(pixels)) for numbers, pixels in groups]
            self._conditions = family.conditions(pipe, self._prompts) if encode_once else None

    def _distribution(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of pictures of one size, then of the mirrored ones."""
        views = [pixels, pixels.flip(-1)] if self._config.horizontal_flip else [pixels]
        found = [self._family.distribution(self._pipe, view[None]) for group in views for view in group]
        mean, deviation = (torch.cat(tensors).float() for tensors in zip(*found, strict=True))
        return mean, deviation

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        """Latents (batch, ...) as the denoiser is given them, and what it is told of their prompts, of one batch."""
        config = self._config
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
        latents = self._family.latents(self._pipe, mean[pictures] + std[pictures] * noise.to(mean.device))
        if self._conditions is not None:
            return latents, self._conditions.take(texts)
        distinct, places = texts.unique(return_inverse=True)
        prompts = [self._prompts[index] for index in distinct.tolist()]
        return latents, self._family.conditions(self._pipe, prompts).take(places)


def groups_by_size(
    images: Sequence[Image.Image], size: int | Literal["native"], multiple: int
) -> list[tuple[Tensor, Tensor]]:
    """Numbers of the pictures of each size, and these as (n, 3, height, width) in [-1, 1], cut around the centre.

    Args:
        images: The pictures.
        size: Pixels to a side of all, or `"native"`.
        multiple: The number of pixels that sides are multiples of.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    upright = [as_seen(image) for image in images]
    for number, image in enumerate(upright):
        wanted = image.size if size == "native" else (size, size)
        width, height = (side // multiple * multiple for side in wanted)
        if min(width, height) < 8:
            raise MoLEError(f"A picture of {wanted[0]}×{wanted[1]} pixels is too small to train on.")
        by_size.setdefault((width, height), []).append(number)
    groups = []
    for (width, height), numbers in by_size.items():
        cut = [ImageOps.fit(upright[k], (width, height), Image.Resampling.LANCZOS) for k in numbers]
        stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in cut]))  # (n, height, width, 3)
        groups.append((torch.tensor(numbers), stacked.permute(0, 3, 1, 2).float() / 127.5 - 1))
    return groups
