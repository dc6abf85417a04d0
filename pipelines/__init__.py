"""diffusers pipelines that compose LoRAs: one mixin, and one line per pipeline.

Another pipeline of diffusers becomes a composing one in one line::

    class MoLEControlNet(MoLEPipelineMixin, StableDiffusionControlNetPipeline): ...
"""

from __future__ import annotations

from . import perturbed
from .flux import MoLEFluxImg2ImgPipeline, MoLEFluxInpaintPipeline, MoLEFluxPipeline
from .flux2 import MoLEFlux2KleinInpaintPipeline, MoLEFlux2KleinPipeline, MoLEFlux2Pipeline
from .krea2 import MoLEKrea2Pipeline
from .mixin import MoLEPipelineMixin
from .opening import pipeline_class
from .qwen_image import MoLEQwenImageImg2ImgPipeline, MoLEQwenImageInpaintPipeline, MoLEQwenImagePipeline
from .stable_diffusion import (
    MoLEStableDiffusionControlNetImg2ImgPipeline,
    MoLEStableDiffusionControlNetInpaintPipeline,
    MoLEStableDiffusionControlNetPipeline,
    MoLEStableDiffusionImg2ImgPipeline,
    MoLEStableDiffusionInpaintPipeline,
    MoLEStableDiffusionPipeline,
)
from .stable_diffusion_3 import (
    MoLEStableDiffusion3Img2ImgPipeline,
    MoLEStableDiffusion3InpaintPipeline,
    MoLEStableDiffusion3Pipeline,
)
from .stable_diffusion_xl import (
    MoLEStableDiffusionXLControlNetImg2ImgPipeline,
    MoLEStableDiffusionXLControlNetInpaintPipeline,
    MoLEStableDiffusionXLControlNetPipeline,
    MoLEStableDiffusionXLImg2ImgPipeline,
    MoLEStableDiffusionXLInpaintPipeline,
    MoLEStableDiffusionXLPipeline,
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
    "MoLEStableDiffusion3Img2ImgPipeline",
    "MoLEStableDiffusion3InpaintPipeline",
    "MoLEStableDiffusion3Pipeline",
    "MoLEStableDiffusionControlNetImg2ImgPipeline",
    "MoLEStableDiffusionControlNetInpaintPipeline",
    "MoLEStableDiffusionControlNetPipeline",
    "MoLEStableDiffusionImg2ImgPipeline",
    "MoLEStableDiffusionInpaintPipeline",
    "MoLEStableDiffusionPipeline",
    "MoLEStableDiffusionXLControlNetImg2ImgPipeline",
    "MoLEStableDiffusionXLControlNetInpaintPipeline",
    "MoLEStableDiffusionXLControlNetPipeline",
    "MoLEStableDiffusionXLImg2ImgPipeline",
    "MoLEStableDiffusionXLInpaintPipeline",
    "MoLEStableDiffusionXLPipeline",
    "MoLEZImageImg2ImgPipeline",
    "MoLEZImageInpaintPipeline",
    "MoLEZImagePipeline",
    "perturbed",
    "pipeline_class",
]
