"""Qwen-Image."""

from __future__ import annotations

from diffusers import QwenImageImg2ImgPipeline, QwenImageInpaintPipeline, QwenImagePipeline

from .auto import register
from .mixin import MoLEPipelineMixin


class MoLEQwenImagePipeline(MoLEPipelineMixin, QwenImagePipeline):
    """`diffusers.QwenImagePipeline` that draws with several LoRAs at once; see `MoLEPipelineMixin`."""


class MoLEQwenImageImg2ImgPipeline(MoLEPipelineMixin, QwenImageImg2ImgPipeline):
    """`diffusers.QwenImageImg2ImgPipeline` with several LoRAs at once; see `MoLEPipelineMixin`."""


class MoLEQwenImageInpaintPipeline(MoLEPipelineMixin, QwenImageInpaintPipeline):
    """`diffusers.QwenImageInpaintPipeline` with several LoRAs at once; see `MoLEPipelineMixin`."""


register(
    "mole-qwen-image",
    text_to_image=MoLEQwenImagePipeline,
    image_to_image=MoLEQwenImageImg2ImgPipeline,
    inpainting=MoLEQwenImageInpaintPipeline,
)
