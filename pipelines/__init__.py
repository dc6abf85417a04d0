"""diffusers pipelines that compose LoRAs: one mixin, and one line per pipeline.

Another pipeline of diffusers becomes a composing one in one line::

    class MoLEControlNet(MoLEPipelineMixin, StableDiffusionControlNetPipeline): ...
"""

from __future__ import annotations

from .mixin import MoLEPipelineMixin
from .stable_diffusion import (
    MoLEStableDiffusionImg2ImgPipeline,
    MoLEStableDiffusionInpaintPipeline,
    MoLEStableDiffusionPipeline,
)

__all__ = [
    "MoLEPipelineMixin",
    "MoLEStableDiffusionImg2ImgPipeline",
    "MoLEStableDiffusionInpaintPipeline",
    "MoLEStableDiffusionPipeline",
]
