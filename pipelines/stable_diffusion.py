"""Stable Diffusion 1.x and 2.x, text to image."""

from __future__ import annotations

from diffusers import StableDiffusionPipeline

from .mixin import MoLEPipelineMixin


class MoLEStableDiffusionPipeline(MoLEPipelineMixin, StableDiffusionPipeline):
    """`diffusers.StableDiffusionPipeline` that draws with several LoRAs at once; see :class:`MoLEPipelineMixin`."""
