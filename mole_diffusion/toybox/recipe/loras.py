"""One LoRA a subject, trained by ``train_lora`` from the five reference pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

from mole_diffusion.lora import save_lora
from mole_diffusion.training import LoRATrainingConfig, train_lora
from mole_diffusion.training.lora import TEXT_ENCODER_TARGETS

from ..subjects import SUBJECTS, reference_captions, references

# Ranks are mixed and five LoRAs have a text encoder too, as files from different people do.
RANKS = dict(zip(SUBJECTS, (8, 4, 16, 8, 8, 12, 8, 16, 8, 8, 6, 10), strict=True))
WITH_TEXT_ENCODER = ("boot", "mug", "clock", "fish", "flower")
IN_KOHYA_LAYOUT = ("cat", "clock")


def lora_config(name: str, *, seed: int, num_steps: int) -> LoRATrainingConfig:
    return LoRATrainingConfig(
        captions=reference_captions(name),
        rank=RANKS[name],
        text_encoder_targets=TEXT_ENCODER_TARGETS if name in WITH_TEXT_ENCODER else (),
        steps=num_steps,
        warmup_steps=min(20, num_steps // 5),
        batch_size=10,
        learning_rate=2e-3,
        mixed_precision="bf16",
        seed=seed,
    )


def train_subject(
    pipe: StableDiffusionPipeline, name: str, assets: Path, work_dir: Path, *, seed: int, num_steps: int
) -> None:
    """Train and save one subject's LoRA, in kohya's layout too where the subject has one."""
    config = lora_config(name, seed=seed, num_steps=num_steps)
    with sdpa_kernel(SDPBackend.MATH):  # see clip.py
        factors = train_lora(pipe, references(name), config, work=work_dir / "loras" / name)
    save_lora(factors, assets / "loras" / f"{name}.safetensors", dtype=torch.float16)
    if name in IN_KOHYA_LAYOUT:
        save_lora(factors, assets / "loras-kohya" / f"{name}.safetensors", layout="kohya", dtype=torch.float16)
