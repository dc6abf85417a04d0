"""A gate training of a few seconds, on the tiny Stable Diffusion and a random CLIP; shared by the tests of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.gating import GateConfig, MoLEModel
from mole_diffusion.pipelines import MoLEStableDiffusionPipeline
from mole_diffusion.training import Concept, GateTrainingConfig, train_gates
from tests.tiny import random_lora, tiny_pipeline

PROMPTS = ("a <v1> cat on grass", "a <v2> dog in the sand")
CONCEPTS = {
    "lora0": Concept(token="<v1>", class_name="cat"),
    "lora1": Concept(token="<v2>", class_name="dog", description="red dog"),
}


def mole_pipeline(loras: int = 2, triggers: Mapping[str, str] | None = None) -> Any:
    pipe = tiny_pipeline(MoLEStableDiffusionPipeline)
    if loras:
        states = {f"lora{seed}": random_lora(pipe.components, seed=seed) for seed in range(loras)}
        pipe.load_loras(states, triggers=triggers)
    return pipe


def config(**changes: Any) -> GateTrainingConfig:
    settings: dict[str, Any] = {
        "gates": GateConfig(),
        "identity_weight": 0.0,
        "balance": "uniform",
        "steps": 2,
        "batch_size": 1,
        "warmup_steps": 0,
        "rollout_steps": 2,
        "guidance_scale": 2.0,
    }
    return GateTrainingConfig(**(settings | changes))


def train(pipe: Any, settings: GateTrainingConfig, clip: DifferentiableCLIP, **options: Any) -> MoLEModel:
    return train_gates(pipe, settings, **({"prompts": PROMPTS, "clip": clip, "progress": False} | options))
