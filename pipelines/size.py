"""How many pictures a call will draw, and how large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..families.latents import LATENT_SIDE


def picture_size(pipe: Any, given: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in pixels.

    Args:
        pipe: The pipeline.
        given: Its call's arguments by name: `height` and `width` go first, then the size of an `image`, a PIL image,
            array or tensor or a list of them, then that of the model.
    """
    several: Any = given.get("image")
    picture: Any = several[0] if isinstance(several, list | tuple) and several else several  # all of one size
    if picture is None:
        denoiser = getattr(pipe, pipe.family.denoiser)
        height = width = getattr(denoiser.config, "sample_size", LATENT_SIDE) * _factor(pipe)
    elif hasattr(picture, "shape"):  # (…, height, width, channels) or (…, channels, height, width)
        channels_last = len(picture.shape) > 2 and picture.shape[-1] in (1, 3, 4)
        height, width = picture.shape[-3:-1] if channels_last else picture.shape[-2:]
    else:
        width, height = picture.size
    return int(given.get("height") or height), int(given.get("width") or width)


def picture_count(given: Mapping[str, Any]) -> int:
    """How many pictures a call with these arguments draws."""
    prompts: Any = given.get("prompt_embeds") if given.get("prompt") is None else given["prompt"]
    several = 1 if prompts is None or isinstance(prompts, str) else len(prompts)
    return several * int(given.get("num_images_per_prompt") or 1)


def latent_grid(pipe: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the latent of a picture."""
    height, width = size
    return max(1, height // _factor(pipe)), max(1, width // _factor(pipe))


def _factor(pipe: Any) -> int:
    """Pixels to a side of one pixel of the latent."""
    return int(getattr(pipe, "vae_scale_factor", 8))
