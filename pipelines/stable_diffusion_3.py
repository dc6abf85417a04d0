"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from diffusers import (
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)

from .auto import register
from .mixin import MoLEPipelineMixin


class MoLEStableDiffusion3Pipeline(MoLEPipelineMixin, StableDiffusion3Pipeline):
    """`diffusers.StableDiffusion3Pipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


class MoLEStableDiffusion3Img2ImgPipeline(MoLEPipelineMixin, StableDiffusion3Img2ImgPipeline):
    """`diffusers.StableDiffusion3Img2ImgPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


class MoLEStableDiffusion3InpaintPipeline(MoLEPipelineMixin, StableDiffusion3InpaintPipeline):
    """`diffusers.StableDiffusion3InpaintPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


register(
    "mole-stable-diffusion-3",
    text_to_image=MoLEStableDiffusion3Pipeline,
    image_to_image=MoLEStableDiffusion3Img2ImgPipeline,
    inpainting=MoLEStableDiffusion3InpaintPipeline,
)
