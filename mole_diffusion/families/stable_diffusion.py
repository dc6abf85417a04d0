"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .architecture import Architecture
from .base import Family
from .clip import CLIPText
from .unet import UNet


class StableDiffusion(Family):
    """A UNet that is told the step and one text, read by one CLIP."""

    name = "stable-diffusion"
    title = "Stable Diffusion 1.x or 2.x"
    denoiser = "unet"
    crossed = True
    architectures: ClassVar[Mapping[str, Architecture]] = {"unet": UNet(), "text_encoder": CLIPText()}

    def fits(self, components: Mapping[str, Any]) -> bool:
        return super().fits(components) and components["unet"].config.addition_embed_type is None
