"""Gates for a set of LoRAs, from prompts alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mole_diffusion.lazily import on_first_use

if TYPE_CHECKING:
    from mole_diffusion.training.gates.concepts import Concept, prompts_from_templates
    from mole_diffusion.training.gates.config import GateTrainingConfig
    from mole_diffusion.training.gates.presets import PRESETS
    from mole_diffusion.training.gates.train import train_gates
else:
    __getattr__, __dir__ = on_first_use(__name__)

__all__ = ["PRESETS", "Concept", "GateTrainingConfig", "prompts_from_templates", "train_gates"]
