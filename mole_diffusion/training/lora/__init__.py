"""A LoRA from a handful of pictures and a rare token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mole_diffusion.lazily import on_first_use

if TYPE_CHECKING:
    from mole_diffusion.training.lora.config import LoRATrainingConfig
    from mole_diffusion.training.lora.targets import TEXT_ENCODER_TARGETS, UNET_TARGETS
    from mole_diffusion.training.lora.train import train_lora
else:
    __getattr__, __dir__ = on_first_use(__name__)

__all__ = ["TEXT_ENCODER_TARGETS", "UNET_TARGETS", "LoRATrainingConfig", "train_lora"]
