"""LoRAs and reference pictures of anonymous subjects, trained as those with names are."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from mole_diffusion.files import atomic_path, write_json
from mole_diffusion.lora import save_lora

from ..anonymous import LORA_FILE, SUBJECT_FILE, draw_anonymous, subject_entries
from ..subjects import Subject, references
from .loras import subject_factors


def make_anonymous(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    count: int,
    seed: int,
    device: torch.device,
    num_steps: int,
) -> list[Subject]:
    """Writes LoRA, reference pictures and `subject.json` of `count` anonymous subjects into folders of `out`.

    `subject.json` is written last: what has one is finished, and is left alone when the command is given again.

    Raises:
        AnonymousSubjectsError: `count` is out of range.
        MoLEError: A half-trained LoRA in `out` is of another base or of other settings.
    """
    subjects = draw_anonymous(count, seed)
    for item in subjects:
        folder = Path(out) / item.name
        if (folder / SUBJECT_FILE).exists():
            continue
        pipe = StableDiffusionPipeline.from_pretrained(base).to(device)
        factors = subject_factors(pipe, item, folder / "work", seed=seed, num_steps=num_steps)
        save_lora(factors, folder / LORA_FILE, dtype=torch.float16)
        for k, picture in enumerate(references(item), start=1):
            with atomic_path(folder / f"reference-{k}.png") as temporary:
                picture.save(temporary)
        write_json(folder / SUBJECT_FILE, subject_entries(item))
    return subjects
