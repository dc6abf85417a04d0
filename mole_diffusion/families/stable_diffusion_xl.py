"""Stable Diffusion XL and what was trained from it: Illustrious, NoobAI, Pony."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .architecture import Architecture
from .base import Family
from .clip import CLIPText
from .unet import UNet


class StableDiffusionXL(Family):
    """A UNet that is also told sizes and a summary of the text, which two CLIPs read."""

    name = "stable-diffusion-xl"
    title = "Stable Diffusion XL"
    denoiser = "unet"
    architectures: ClassVar[Mapping[str, Architecture]] = {
        "unet": UNet(),
        "text_encoder": CLIPText(),
        "text_encoder_2": CLIPText(),
    }

    def fits(self, components: Mapping[str, Any]) -> bool:
        return super().fits(components) and components["unet"].config.addition_embed_type == "text_time"
