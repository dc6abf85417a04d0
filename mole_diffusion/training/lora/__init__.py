"""A LoRA from a handful of pictures and a rare token."""

from mole_diffusion.training.lora.config import TEXT_ENCODER_TARGETS, UNET_TARGETS, LoRATrainingConfig
from mole_diffusion.training.lora.train import train_lora

__all__ = ["TEXT_ENCODER_TARGETS", "UNET_TARGETS", "LoRATrainingConfig", "train_lora"]
