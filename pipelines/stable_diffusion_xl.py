"""Stable Diffusion XL."""

from __future__ import annotations

from diffusers import (
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from .auto import register
from .mixin import MoLEPipelineMixin


class MoLEStableDiffusionXLPipeline(MoLEPipelineMixin, StableDiffusionXLPipeline):
    """`diffusers.StableDiffusionXLPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


class MoLEStableDiffusionXLImg2ImgPipeline(MoLEPipelineMixin, StableDiffusionXLImg2ImgPipeline):
    """`diffusers.StableDiffusionXLImg2ImgPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


class MoLEStableDiffusionXLInpaintPipeline(MoLEPipelineMixin, StableDiffusionXLInpaintPipeline):
    """`diffusers.StableDiffusionXLInpaintPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


class MoLEStableDiffusionXLControlNetPipeline(MoLEPipelineMixin, StableDiffusionXLControlNetPipeline):
    """`diffusers.StableDiffusionXLControlNetPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


class MoLEStableDiffusionXLControlNetImg2ImgPipeline(MoLEPipelineMixin, StableDiffusionXLControlNetImg2ImgPipeline):
    """`diffusers.StableDiffusionXLControlNetImg2ImgPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


class MoLEStableDiffusionXLControlNetInpaintPipeline(MoLEPipelineMixin, StableDiffusionXLControlNetInpaintPipeline):
    """`diffusers.StableDiffusionXLControlNetInpaintPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


register(
    "mole-stable-diffusion-xl",
    text_to_image=MoLEStableDiffusionXLPipeline,
    image_to_image=MoLEStableDiffusionXLImg2ImgPipeline,
    inpainting=MoLEStableDiffusionXLInpaintPipeline,
)

register(
    "mole-stable-diffusion-xl-controlnet",
    text_to_image=MoLEStableDiffusionXLControlNetPipeline,
    image_to_image=MoLEStableDiffusionXLControlNetImg2ImgPipeline,
    inpainting=MoLEStableDiffusionXLControlNetInpaintPipeline,
)
