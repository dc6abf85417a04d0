"""Training loops: a LoRA from pictures, gates from prompts."""

from mole_diffusion.training.gates import GateTrainingConfig, train_gates
from mole_diffusion.training.loop import TrainingDivergedError
from mole_diffusion.training.lora import TEXT_ENCODER_TARGETS, UNET_TARGETS, LoRATrainingConfig, train_lora

__all__ = [
    "TEXT_ENCODER_TARGETS",
    "UNET_TARGETS",
    "GateTrainingConfig",
    "LoRATrainingConfig",
    "TrainingDivergedError",
    "train_gates",
    "train_lora",
]
