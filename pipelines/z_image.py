"""Z-Image."""

from __future__ import annotations

from typing import Any

from .auto import register
from .mixin import MoLEPipelineMixin
from .newer import newer

ZImagePipeline: Any = newer("ZImagePipeline", since="0.36")
ZImageImg2ImgPipeline: Any = newer("ZImageImg2ImgPipeline", since="0.36")
ZImageInpaintPipeline: Any = newer("ZImageInpaintPipeline", since="0.37")


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
