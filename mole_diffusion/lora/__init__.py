"""LoRA files: read in any common layout, checked against the model, written for other programs."""

from mole_diffusion.lora.convert import convert_lora
from mole_diffusion.lora.errors import LoRAError
from mole_diffusion.lora.factors import LoRA, LoRAFactors
from mole_diffusion.lora.load import load_lora
from mole_diffusion.lora.report import LoRAReport, inspect_lora
from mole_diffusion.lora.save import save_lora
from mole_diffusion.lora.verdict import Verdict, fitting, judge

__all__ = [
    "LoRA",
    "LoRAError",
    "LoRAFactors",
    "LoRAReport",
    "Verdict",
    "convert_lora",
    "fitting",
    "inspect_lora",
    "judge",
    "load_lora",
    "save_lora",
]
