"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from .architecture import Architecture
from .base import ALL, Family, Listening, unwrapped
from .clip import CLIPText, clip_skeleton, layers_behind
from .skeleton import Components, Skeleton
from .together import Together
from .unet import NAMES, UNet, together


def _first() -> Components:
    from diffusers import UNet2DConditionModel

    return {"unet": UNet2DConditionModel(cross_attention_dim=768), "text_encoder": clip_skeleton(768, 12, 12)}


def _second() -> Components:
    from diffusers import UNet2DConditionModel

    heads = (5, 10, 20, 20)
    unet = UNet2DConditionModel(cross_attention_dim=1024, attention_head_dim=heads, use_linear_projection=True)
    return {"unet": unet, "text_encoder": clip_skeleton(1024, 23, 16)}


class StableDiffusion(Family):
    """A UNet that is told the step and one text, read by one CLIP."""

    name = "stable-diffusion"
    title = "Stable Diffusion 1.x or 2.x"
    denoiser = "unet"
    architectures: ClassVar[Mapping[str, Architecture]] = {"unet": UNet(), "text_encoder": CLIPText()}
    skeletons = (
        Skeleton("Stable Diffusion 1.x", NAMES, _first),
        Skeleton("Stable Diffusion 2.x", NAMES, _second),
    )

    def fits(self, components: Mapping[str, Any]) -> bool:
        return super().fits(components) and components["unet"].config.addition_embed_type is None

    def is_read(self, components: Mapping[str, Any], component: str, module: str, listening: Listening = ALL) -> bool:
        if component != "text_encoder" or listening.negative:
            return super().is_read(components, component, module, listening)
        behind = layers_behind(unwrapped(components[component]), module)
        return behind is None or behind >= listening.skipped  # the norm at the end is taken all the same

    def together(self, encoded: Any, others: Sequence[Any]) -> Together:
        return together(encoded, others)
