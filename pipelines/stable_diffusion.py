"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline

from .auto import register
from .mixin import MoLEPipelineMixin


class MoLEStableDiffusionPipeline(MoLEPipelineMixin, StableDiffusionPipeline):
    """`diffusers.StableDiffusionPipeline` that draws with several LoRAs at once; see :class:`MoLEPipelineMixin`."""


class MoLEStableDiffusionImg2ImgPipeline(MoLEPipelineMixin, StableDiffusionImg2ImgPipeline):
    """`diffusers.StableDiffusionImg2ImgPipeline` with several LoRAs at once; see :class:`MoLEPipelineMixin`."""


class MoLEStableDiffusionInpaintPipeline(MoLEPipelineMixin, StableDiffusionInpaintPipeline):
    """`diffusers.StableDiffusionInpaintPipeline` with several LoRAs at once; see :class:`MoLEPipelineMixin`."""


register(
    "mole-stable-diffusion",
    text_to_image=MoLEStableDiffusionPipeline,
    image_to_image=MoLEStableDiffusionImg2ImgPipeline,
    inpainting=MoLEStableDiffusionInpaintPipeline,
)
