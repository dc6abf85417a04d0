"""Gates for a few sets of subjects, trained from prompts alone."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import torch

from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.pipelines import MoLEStableDiffusionPipeline
from mole_diffusion.training import GateTrainingConfig, train_gates

from ..concepts import concept
from ..subjects import subject_prompt
from ..world import GROUNDS
from .draw import GUIDANCE_SCALE

SETS = ("cat+boot+teapot", "mug+house+clock", "boot+fish+flower", "teapot+mug+car", "robot+clock+boat")
TRAINED_ON = GROUNDS[:4]  # the other two are for measuring


def gate_training(*, seed: int, num_steps: int) -> GateTrainingConfig:
    """The settings by which the shipped gates are trained."""
    return GateTrainingConfig(
        steps=num_steps,
        warmup_steps=min(10, num_steps // 5),
        guidance_scale=GUIDANCE_SCALE,
        seed=seed,
    )


def train_set(names: str, assets: Path, work_dir: Path, *, seed: int, device: torch.device, num_steps: int) -> None:
    """Trains and saves the gates of one set of subjects; CLIP reads looks where the prompts have tokens."""
    pipe = MoLEStableDiffusionPipeline.from_pretrained(assets / "base").to(device)
    pipe.load_loras({name: assets / "loras" / f"{name}.safetensors" for name in names.split("+")})
    train_gates(
        pipe,
        gate_training(seed=seed, num_steps=num_steps),
        prompts=[subject_prompt(order, ground) for order in permutations(names.split("+")) for ground in TRAINED_ON],
        concepts={name: concept(name) for name in names.split("+")},
        clip=DifferentiableCLIP(assets / "clip"),
        out=assets / "gates" / names,
        work=work_dir / "gates" / names,
        pictures=False,
    )
