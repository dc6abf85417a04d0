"""One LoRA a subject, trained by `train_lora` from its five reference pictures and ten in company.

Trained on pictures of the subject alone, a LoRA learns that there is nothing else in a picture, and its look fades as
soon as a prompt names other things.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

from mole_diffusion.lora import LoRAFactors, save_lora
from mole_diffusion.lora.triggers import write_triggers
from mole_diffusion.training import LoRATrainingConfig, train_lora
from mole_diffusion.training.lora import TEXT_ENCODER_TARGETS

from ..render import render
from ..subjects import Subject, reference_captions, reference_scenes, subject
from ..world import CLASSES, GROUNDS, Scene, article, compose_scene, phrase_caption, random_look
from .precision import bfloat16_pays

# Ranks are mixed and five LoRAs have a text encoder too, as files from different people do.
RANKS = (8, 4, 16, 8, 8, 12, 8, 16, 8, 8, 6, 10)
WITH_TEXT_ENCODER = (1, 3, 5, 7, 10)
IN_KOHYA_LAYOUT = ("cat", "clock")
NUM_IN_COMPANY = 15
MOST_OTHERS = 5


def company_scenes(name: str | Subject) -> list[Scene]:
    """Scenes that show the subject beside one to five other things, of other classes and of any look."""
    item = subject(name)
    rng = np.random.default_rng([6, item.seed])
    scenes = []
    for k in range(NUM_IN_COMPANY):
        others = rng.permutation([other for other in CLASSES if other != item.class_name])[: 1 + k % MOST_OTHERS]
        names, looks = [item.class_name, *map(str, others)], [item.look, *(random_look(rng) for _ in others)]
        scenes.append(compose_scene(names, looks, str(rng.choice(GROUNDS)), rng))
    return scenes


def company_caption(name: str | Subject, scene: Scene) -> str:
    """From left to right, as all captions: the subject by its token, the others by their looks."""
    item = subject(name)
    phrases = []
    for thing in sorted(scene.objects, key=lambda thing: (thing.x, thing.y)):
        words = item.token if thing.class_name == item.class_name else str(thing.look)
        phrases.append(f"{article(words)} {words} {thing.class_name}")
    return phrase_caption(phrases, scene.ground)


def lora_config(name: str | Subject, *, seed: int, num_steps: int, half: bool = False) -> LoRATrainingConfig:
    """The settings by which the LoRA of a subject is trained."""
    kind = subject(name).seed % len(RANKS)
    return LoRATrainingConfig(
        captions=[*reference_captions(name), *(company_caption(name, scene) for scene in company_scenes(name))],
        triggers=[subject(name).trigger],
        rank=RANKS[kind],
        text_encoder_targets=TEXT_ENCODER_TARGETS if kind in WITH_TEXT_ENCODER else (),
        steps=num_steps,
        warmup_steps=min(20, num_steps // 5),
        batch_size=10,
        learning_rate=2e-3,
        resolution="native",  # pictures of five things and more are larger
        mixed_precision="bf16" if half else "no",
        seed=seed,
    )


def subject_factors(
    pipe: StableDiffusionPipeline, name: str | Subject, work_dir: Path, *, seed: int, num_steps: int
) -> dict[str, dict[str, LoRAFactors]]:
    """Trains one subject's LoRA on its reference pictures and its company."""
    config = lora_config(name, seed=seed, num_steps=num_steps, half=bfloat16_pays(pipe.device))
    scenes = [*reference_scenes(name), *company_scenes(name)]
    with sdpa_kernel(SDPBackend.MATH):  # see clip.py
        return train_lora(pipe, [render(scene) for scene in scenes], config, work=work_dir)


def train_subject(
    pipe: StableDiffusionPipeline, name: str, assets: Path, work_dir: Path, *, seed: int, num_steps: int
) -> None:
    """Trains and saves one subject's LoRA, in kohya's layout too where the subject has one."""
    factors = subject_factors(pipe, name, work_dir / "loras" / name, seed=seed, num_steps=num_steps)
    metadata = write_triggers([subject(name).trigger])
    save_lora(factors, assets / "loras" / f"{name}.safetensors", metadata=metadata, dtype=torch.float16)
    if name in IN_KOHYA_LAYOUT:
        file = assets / "loras-kohya" / f"{name}.safetensors"
        save_lora(factors, file, layout="kohya", metadata=metadata, dtype=torch.float16)
