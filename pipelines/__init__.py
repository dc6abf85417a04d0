"""diffusers pipelines that compose LoRAs: one mixin, and one line per pipeline.

Another pipeline of diffusers becomes a composing one in one line::

    class MoLEImg2Img(MoLEPipelineMixin, StableDiffusionImg2ImgPipeline): ...
"""

from __future__ import annotations

from .mixin import MoLEPipelineMixin
from .stable_diffusion import MoLEStableDiffusionPipeline

__all__ = ["MoLEPipelineMixin", "MoLEStableDiffusionPipeline"]
