"""Gates for a set of LoRAs, from prompts alone."""

from mole_diffusion.training.gates.concepts import Concept, prompts_from_templates
from mole_diffusion.training.gates.config import GateTrainingConfig
from mole_diffusion.training.gates.presets import PRESETS
from mole_diffusion.training.gates.train import train_gates

__all__ = ["PRESETS", "Concept", "GateTrainingConfig", "prompts_from_templates", "train_gates"]
