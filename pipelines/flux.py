"""FLUX.1."""

from __future__ import annotations

from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline

from .auto import register
from .mixin import MoLEPipelineMixin


class MoLEFluxPipeline(MoLEPipelineMixin, FluxPipeline):
    """`diffusers.FluxPipeline` that draws with several LoRAs at once; see `MoLEPipelineMixin`."""


class MoLEFluxImg2ImgPipeline(MoLEPipelineMixin, FluxImg2ImgPipeline):
    """`diffusers.FluxImg2ImgPipeline` with several LoRAs at once; see `MoLEPipelineMixin`."""


class MoLEFluxInpaintPipeline(MoLEPipelineMixin, FluxInpaintPipeline):
    """`diffusers.FluxInpaintPipeline` with several LoRAs at once; see `MoLEPipelineMixin`."""


register(
    "mole-flux",
    text_to_image=MoLEFluxPipeline,
    image_to_image=MoLEFluxImg2ImgPipeline,
    inpainting=MoLEFluxInpaintPipeline,
)
