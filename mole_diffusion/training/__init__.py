"""Training loops: a LoRA from pictures, gates from prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mole_diffusion.lazily import on_first_use

if TYPE_CHECKING:
    from mole_diffusion.training.engine.loop import TrainingDivergedError
    from mole_diffusion.training.gates import (
        PRESETS,
        Concept,
        GateTrainingConfig,
        prompts_from_templates,
        train_gates,
    )
    from mole_diffusion.training.lora import TEXT_ENCODER_TARGETS, UNET_TARGETS, LoRATrainingConfig, train_lora
else:
    __getattr__, __dir__ = on_first_use(__name__, "train", "training")

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
