"""Pipelines with perturbed-attention guidance, which an `AutoPipelineFor….from_pipe(pipe, enable_pag=True)` gives."""

from __future__ import annotations

from diffusers import (
    StableDiffusionPAGImg2ImgPipeline,
    StableDiffusionPAGInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLPAGImg2ImgPipeline,
    StableDiffusionXLPAGInpaintPipeline,
    StableDiffusionXLPAGPipeline,
)

from .auto import register
from .mixin import MoLEPipelineMixin


class MoLEStableDiffusionPAGPipeline(MoLEPipelineMixin, StableDiffusionPAGPipeline):
    """`diffusers.StableDiffusionPAGPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


class MoLEStableDiffusionPAGImg2ImgPipeline(MoLEPipelineMixin, StableDiffusionPAGImg2ImgPipeline):
    """`diffusers.StableDiffusionPAGImg2ImgPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


class MoLEStableDiffusionPAGInpaintPipeline(MoLEPipelineMixin, StableDiffusionPAGInpaintPipeline):
    """`diffusers.StableDiffusionPAGInpaintPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


class MoLEStableDiffusionXLPAGPipeline(MoLEPipelineMixin, StableDiffusionXLPAGPipeline):
    """`diffusers.StableDiffusionXLPAGPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


class MoLEStableDiffusionXLPAGImg2ImgPipeline(MoLEPipelineMixin, StableDiffusionXLPAGImg2ImgPipeline):
    """`diffusers.StableDiffusionXLPAGImg2ImgPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


class MoLEStableDiffusionXLPAGInpaintPipeline(MoLEPipelineMixin, StableDiffusionXLPAGInpaintPipeline):
    """`diffusers.StableDiffusionXLPAGInpaintPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


register(
    "mole-stable-diffusion-pag",
    text_to_image=MoLEStableDiffusionPAGPipeline,
    image_to_image=MoLEStableDiffusionPAGImg2ImgPipeline,
    inpainting=MoLEStableDiffusionPAGInpaintPipeline,
)

register(
    "mole-stable-diffusion-xl-pag",
    text_to_image=MoLEStableDiffusionXLPAGPipeline,
    image_to_image=MoLEStableDiffusionXLPAGImg2ImgPipeline,
    inpainting=MoLEStableDiffusionXLPAGInpaintPipeline,
)
