"""Several trained concept LoRAs in one picture: Mixture of LoRA Experts for diffusers.

Names are handed out lazily: `import mole_diffusion` loads neither torch nor diffusers, a name's first use does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .lazily import on_first_use

if TYPE_CHECKING:
    from . import metrics, toybox
    from .gating import GateConfig, MoLEModel
    from .lora import inspect_lora, load_lora
    from .pipelines import (
        MoLEFlux2KleinInpaintPipeline,
        MoLEFlux2KleinPipeline,
        MoLEFlux2Pipeline,
        MoLEFluxImg2ImgPipeline,
        MoLEFluxInpaintPipeline,
        MoLEFluxPipeline,
        MoLEKrea2Pipeline,
        MoLEPipelineMixin,
        MoLEQwenImageImg2ImgPipeline,
        MoLEQwenImageInpaintPipeline,
        MoLEQwenImagePipeline,
        MoLEStableDiffusion3Img2ImgPipeline,
        MoLEStableDiffusion3InpaintPipeline,
        MoLEStableDiffusion3Pipeline,
        MoLEStableDiffusionControlNetImg2ImgPipeline,
        MoLEStableDiffusionControlNetInpaintPipeline,
        MoLEStableDiffusionControlNetPipeline,
        MoLEStableDiffusionImg2ImgPipeline,
        MoLEStableDiffusionInpaintPipeline,
        MoLEStableDiffusionPipeline,
        MoLEStableDiffusionXLControlNetImg2ImgPipeline,
        MoLEStableDiffusionXLControlNetInpaintPipeline,
        MoLEStableDiffusionXLControlNetPipeline,
        MoLEStableDiffusionXLImg2ImgPipeline,
        MoLEStableDiffusionXLInpaintPipeline,
        MoLEStableDiffusionXLPipeline,
        MoLEZImageImg2ImgPipeline,
        MoLEZImageInpaintPipeline,
        MoLEZImagePipeline,
    )
    from .training import GateTrainingConfig, LoRATrainingConfig, train_gates, train_lora
else:
    __getattr__, __dir__ = on_first_use(__name__)

__version__ = "0.1.0"

# In a checkout that is not installed, `pipelines/` and `metrics/` lie beside this folder and not in it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "pipelines" / "__init__.py").is_file():
    __path__.append(str(_root))

__all__ = [
    "GateConfig",
    "GateTrainingConfig",
    "LoRATrainingConfig",
    "MoLEFlux2KleinInpaintPipeline",
    "MoLEFlux2KleinPipeline",
    "MoLEFlux2Pipeline",
    "MoLEFluxImg2ImgPipeline",
    "MoLEFluxInpaintPipeline",
    "MoLEFluxPipeline",
    "MoLEKrea2Pipeline",
    "MoLEModel",
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
    "inspect_lora",
    "load_lora",
    "metrics",
    "toybox",
    "train_gates",
    "train_lora",
]
