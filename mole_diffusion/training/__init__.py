"""Training loops: a LoRA from pictures, gates from prompts."""

from mole_diffusion.extras import needs

with needs("train", "training"):
    from mole_diffusion.training.engine.loop import TrainingDivergedError
    from mole_diffusion.training.gates import (
        PRESETS,
        Concept,
        GateTrainingConfig,
        prompts_from_templates,
        train_gates,
    )
    from mole_diffusion.training.lora import TEXT_ENCODER_TARGETS, UNET_TARGETS, LoRATrainingConfig, train_lora

__all__ = [
    "PRESETS",
    "TEXT_ENCODER_TARGETS",
    "UNET_TARGETS",
    "Concept",
    "GateTrainingConfig",
    "LoRATrainingConfig",
    "TrainingDivergedError",
    "prompts_from_templates",
    "train_gates",
    "train_lora",
]
