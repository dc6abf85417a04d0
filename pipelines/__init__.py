"""diffusers pipelines that compose LoRAs: one mixin, and one line per pipeline.

Another pipeline of diffusers becomes a composing one in one line::

    class MoLEControlNet(MoLEPipelineMixin, StableDiffusionControlNetPipeline): ...
"""

from __future__ import annotations

from .flux import MoLEFluxImg2ImgPipeline, MoLEFluxInpaintPipeline, MoLEFluxPipeline
from .flux2 import MoLEFlux2KleinInpaintPipeline, MoLEFlux2KleinPipeline, MoLEFlux2Pipeline
from .krea2 import MoLEKrea2Pipeline
from .mixin import MoLEPipelineMixin
from .qwen_image import MoLEQwenImageImg2ImgPipeline, MoLEQwenImageInpaintPipeline, MoLEQwenImagePipeline
from .stable_diffusion import (
    MoLEStableDiffusionImg2ImgPipeline,
    MoLEStableDiffusionInpaintPipeline,
    MoLEStableDiffusionPipeline,
)
from .z_image import MoLEZImageImg2ImgPipeline, MoLEZImageInpaintPipeline, MoLEZImagePipeline

__all__ = [
    "MoLEFlux2KleinInpaintPipeline",
    "MoLEFlux2KleinPipeline",
    "MoLEFlux2Pipeline",
    "MoLEFluxImg2ImgPipeline",
    "MoLEFluxInpaintPipeline",
    "MoLEFluxPipeline",
    "MoLEKrea2Pipeline",
    "MoLEPipelineMixin",
    "MoLEQwenImageImg2ImgPipeline",
    "MoLEQwenImageInpaintPipeline",
    "MoLEQwenImagePipeline",
    "MoLEStableDiffusionImg2ImgPipeline",
    "MoLEStableDiffusionInpaintPipeline",
    "MoLEStableDiffusionPipeline",
    "MoLEZImageImg2ImgPipeline",
    "MoLEZImageInpaintPipeline",
    "MoLEZImagePipeline",
]
