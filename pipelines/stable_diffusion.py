"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from diffusers import (
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from .auto import register
from .mixin import MoLEPipelineMixin


class MoLEStableDiffusionPipeline(MoLEPipelineMixin, StableDiffusionPipeline):
    """`diffusers.StableDiffusionPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


class MoLEStableDiffusionImg2ImgPipeline(MoLEPipelineMixin, StableDiffusionImg2ImgPipeline):
    """`diffusers.StableDiffusionImg2ImgPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


class MoLEStableDiffusionInpaintPipeline(MoLEPipelineMixin, StableDiffusionInpaintPipeline):
    """`diffusers.StableDiffusionInpaintPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


class MoLEStableDiffusionControlNetPipeline(MoLEPipelineMixin, StableDiffusionControlNetPipeline):
    """`diffusers.StableDiffusionControlNetPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


class MoLEStableDiffusionControlNetImg2ImgPipeline(MoLEPipelineMixin, StableDiffusionControlNetImg2ImgPipeline):
    """`diffusers.StableDiffusionControlNetImg2ImgPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


class MoLEStableDiffusionControlNetInpaintPipeline(MoLEPipelineMixin, StableDiffusionControlNetInpaintPipeline):
    """`diffusers.StableDiffusionControlNetInpaintPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


register(
    "mole-stable-diffusion",
    text_to_image=MoLEStableDiffusionPipeline,
    image_to_image=MoLEStableDiffusionImg2ImgPipeline,
    inpainting=MoLEStableDiffusionInpaintPipeline,
)

register(
    "mole-stable-diffusion-controlnet",
    text_to_image=MoLEStableDiffusionControlNetPipeline,
    image_to_image=MoLEStableDiffusionControlNetImg2ImgPipeline,
    inpainting=MoLEStableDiffusionControlNetInpaintPipeline,
)
