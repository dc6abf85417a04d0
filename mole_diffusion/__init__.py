"""Several trained concept LoRAs in one picture: Mixture of LoRA Experts for diffusers.

Names are handed out lazily: `import mole_diffusion` loads neither torch nor diffusers, a name's first use does.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import metrics as metrics
    from . import toybox as toybox
    from .gating import GateConfig as GateConfig
    from .gating import MoLEModel as MoLEModel
    from .lora import inspect_lora as inspect_lora
    from .lora import load_lora as load_lora
    from .pipelines import MoLEFlux2KleinInpaintPipeline as MoLEFlux2KleinInpaintPipeline
    from .pipelines import MoLEFlux2KleinPipeline as MoLEFlux2KleinPipeline
    from .pipelines import MoLEFlux2Pipeline as MoLEFlux2Pipeline
    from .pipelines import MoLEFluxImg2ImgPipeline as MoLEFluxImg2ImgPipeline
    from .pipelines import MoLEFluxInpaintPipeline as MoLEFluxInpaintPipeline
    from .pipelines import MoLEFluxPipeline as MoLEFluxPipeline
    from .pipelines import MoLEKrea2Pipeline as MoLEKrea2Pipeline
    from .pipelines import MoLEPipelineMixin as MoLEPipelineMixin
    from .pipelines import MoLEQwenImageImg2ImgPipeline as MoLEQwenImageImg2ImgPipeline
    from .pipelines import MoLEQwenImageInpaintPipeline as MoLEQwenImageInpaintPipeline
    from .pipelines import MoLEQwenImagePipeline as MoLEQwenImagePipeline
    from .pipelines import MoLEStableDiffusion3Img2ImgPipeline as MoLEStableDiffusion3Img2ImgPipeline
    from .pipelines import MoLEStableDiffusion3InpaintPipeline as MoLEStableDiffusion3InpaintPipeline
    from .pipelines import MoLEStableDiffusion3Pipeline as MoLEStableDiffusion3Pipeline
    from .pipelines import MoLEStableDiffusionControlNetImg2ImgPipeline as MoLEStableDiffusionControlNetImg2ImgPipeline
    from .pipelines import MoLEStableDiffusionControlNetInpaintPipeline as MoLEStableDiffusionControlNetInpaintPipeline
    from .pipelines import MoLEStableDiffusionControlNetPipeline as MoLEStableDiffusionControlNetPipeline
    from .pipelines import MoLEStableDiffusionImg2ImgPipeline as MoLEStableDiffusionImg2ImgPipeline
    from .pipelines import MoLEStableDiffusionInpaintPipeline as MoLEStableDiffusionInpaintPipeline
    from .pipelines import MoLEStableDiffusionPipeline as MoLEStableDiffusionPipeline
    from .pipelines import (
        MoLEStableDiffusionXLControlNetImg2ImgPipeline as MoLEStableDiffusionXLControlNetImg2ImgPipeline,
    )
    from .pipelines import (
        MoLEStableDiffusionXLControlNetInpaintPipeline as MoLEStableDiffusionXLControlNetInpaintPipeline,
    )
    from .pipelines import MoLEStableDiffusionXLControlNetPipeline as MoLEStableDiffusionXLControlNetPipeline
    from .pipelines import MoLEStableDiffusionXLImg2ImgPipeline as MoLEStableDiffusionXLImg2ImgPipeline
    from .pipelines import MoLEStableDiffusionXLInpaintPipeline as MoLEStableDiffusionXLInpaintPipeline
    from .pipelines import MoLEStableDiffusionXLPipeline as MoLEStableDiffusionXLPipeline
    from .pipelines import MoLEZImageImg2ImgPipeline as MoLEZImageImg2ImgPipeline
    from .pipelines import MoLEZImageInpaintPipeline as MoLEZImageInpaintPipeline
    from .pipelines import MoLEZImagePipeline as MoLEZImagePipeline
    from .training import GateTrainingConfig as GateTrainingConfig
    from .training import LoRATrainingConfig as LoRATrainingConfig
    from .training import train_gates as train_gates
    from .training import train_lora as train_lora

__version__ = "0.1.0"

# In a checkout that is not installed, `pipelines/` and `metrics/` lie beside this folder and not in it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "pipelines" / "__init__.py").is_file():
    __path__.append(str(_root))

_HOME = {  # public name -> the sub-package that has it
    "MoLEPipelineMixin": "pipelines",
    "MoLEStableDiffusionPipeline": "pipelines",
    "MoLEStableDiffusionImg2ImgPipeline": "pipelines",
    "MoLEStableDiffusionInpaintPipeline": "pipelines",
    "MoLEFluxPipeline": "pipelines",
    "MoLEFluxImg2ImgPipeline": "pipelines",
    "MoLEFluxInpaintPipeline": "pipelines",
    "MoLEFlux2Pipeline": "pipelines",
    "MoLEFlux2KleinPipeline": "pipelines",
    "MoLEFlux2KleinInpaintPipeline": "pipelines",
    "MoLEZImagePipeline": "pipelines",
    "MoLEZImageImg2ImgPipeline": "pipelines",
    "MoLEZImageInpaintPipeline": "pipelines",
    "MoLEKrea2Pipeline": "pipelines",
    "MoLEQwenImagePipeline": "pipelines",
    "MoLEQwenImageImg2ImgPipeline": "pipelines",
    "MoLEQwenImageInpaintPipeline": "pipelines",
    "MoLEStableDiffusionControlNetPipeline": "pipelines",
    "MoLEStableDiffusionControlNetImg2ImgPipeline": "pipelines",
    "MoLEStableDiffusionControlNetInpaintPipeline": "pipelines",
    "MoLEStableDiffusionXLPipeline": "pipelines",
    "MoLEStableDiffusionXLImg2ImgPipeline": "pipelines",
    "MoLEStableDiffusionXLInpaintPipeline": "pipelines",
    "MoLEStableDiffusionXLControlNetPipeline": "pipelines",
    "MoLEStableDiffusionXLControlNetImg2ImgPipeline": "pipelines",
    "MoLEStableDiffusionXLControlNetInpaintPipeline": "pipelines",
    "MoLEStableDiffusion3Pipeline": "pipelines",
    "MoLEStableDiffusion3Img2ImgPipeline": "pipelines",
    "MoLEStableDiffusion3InpaintPipeline": "pipelines",
    "load_lora": "lora",
    "inspect_lora": "lora",
    "GateConfig": "gating",
    "MoLEModel": "gating",
    "LoRATrainingConfig": "training",
    "train_lora": "training",
    "GateTrainingConfig": "training",
    "train_gates": "training",
}
_SUBMODULES = ("toybox", "metrics")

__all__ = [*_HOME, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
