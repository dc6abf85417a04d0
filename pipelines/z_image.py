"""Z-Image."""

from __future__ import annotations

from diffusers import ZImageImg2ImgPipeline, ZImageInpaintPipeline, ZImagePipeline

from .auto import register
from .mixin import MoLEPipelineMixin


class MoLEZImagePipeline(MoLEPipelineMixin, ZImagePipeline):
    """`diffusers.ZImagePipeline` that draws with several LoRAs at once; see `MoLEPipelineMixin`."""


class MoLEZImageImg2ImgPipeline(MoLEPipelineMixin, ZImageImg2ImgPipeline):
    """`diffusers.ZImageImg2ImgPipeline` with several LoRAs at once; see `MoLEPipelineMixin`."""


class MoLEZImageInpaintPipeline(MoLEPipelineMixin, ZImageInpaintPipeline):
    """`diffusers.ZImageInpaintPipeline` with several LoRAs at once; see `MoLEPipelineMixin`."""


register(
    "mole-z-image",
    text_to_image=MoLEZImagePipeline,
    image_to_image=MoLEZImageImg2ImgPipeline,
    inpainting=MoLEZImageInpaintPipeline,
)
