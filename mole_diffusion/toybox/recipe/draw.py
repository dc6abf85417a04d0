"""Pictures from a toybox model, with the settings of all its measurements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ..world import IMAGE_SIZE
from .precision import fast_autocast

NUM_INFERENCE_STEPS = 25
GUIDANCE_SCALE = 2.0  # at 3 orange runs over: a LoRA alone shows its look in 84 % of pictures instead of 99
_CHUNK = 50


def draw(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    side: int = IMAGE_SIZE,
) -> list[Image.Image]:
    """One picture a prompt, `side` pixels wide; picture k has the noise of `seed + k` whatever the others are.

    The models run in bfloat16 where that is faster.
    """
    pictures: list[Image.Image] = []
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), _CHUNK):
        chunk = list(prompts[start : start + _CHUNK])
        generators = [torch.Generator("cpu").manual_seed(seed + start + k) for k in range(len(chunk))]
        with fast_autocast(pipe.device):
            pictures += pipe(
                chunk,
                num_inference_steps=NUM_INFERENCE_STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=generators,
                height=side,
                width=side,
            ).images
    return pictures
