"""LoRAs and reference pictures of anonymous subjects, trained as those with names are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from mole_diffusion.errors import MoLEError
from mole_diffusion.files import atomic_path, write_json
from mole_diffusion.lora import save_lora
from mole_diffusion.reading import parse_json
from mole_diffusion.tensor_files import TensorFile
from mole_diffusion.training.engine.checkpoint import differences, made_of, parts_of_base

from ..anonymous import LORA_FILE, SUBJECT_FILE, draw_anonymous, read_subject, subject_entries
from ..subjects import Subject, references
from .loras import lora_config, subject_factors

MADE_OF = "mole_diffusion.made_of"  # in the header of a LoRA's file


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

    `subject.json` is written last: what has one is finished, and is left alone when the command is given again. What a
    LoRA was trained with stands in its file.

    Raises:
        AnonymousSubjectsError: `count` is out of range.
        MoLEError: A LoRA in `out`, half-trained or finished, is of another base, subject or setting.
    """
    subjects = draw_anonymous(count, seed)
    pipe = StableDiffusionPipeline.from_pretrained(base).to(device)
    parts = {name: list(contents) for name, contents in parts_of_base(pipe).items()}
    trained_with = {item: made_of(lora_config(item, seed=seed, num_steps=num_steps), parts) for item in subjects}
    done = [item for item in subjects if (Path(out) / item.name / SUBJECT_FILE).exists()]
    for item in done:  # all of them before any is trained
        _refuse_another(Path(out) / item.name, item, trained_with[item])
    for item in (item for item in subjects if item not in done):
        folder = Path(out) / item.name
        factors = subject_factors(pipe, item, folder / "work", seed=seed, num_steps=num_steps)
        metadata = {MADE_OF: json.dumps(trained_with[item])}
        save_lora(factors, folder / LORA_FILE, metadata=metadata, dtype=torch.float16)
        for k, picture in enumerate(references(item), start=1):
            with atomic_path(folder / f"reference-{k}.png") as temporary:
                picture.save(temporary)
        write_json(folder / SUBJECT_FILE, subject_entries(item))
    return subjects


def _refuse_another(folder: Path, item: Subject, trained_with: Mapping[str, str]) -> None:
    """Raises MoLEError where a finished subject is another, or its LoRA was trained with something else.

    Files of earlier versions do not say what with, and are taken.
    """
    lora = folder / LORA_FILE
    try:
        said = TensorFile(lora).metadata.get(MADE_OF)
    except MoLEError as error:
        raise MoLEError(f"{lora}: {error} Or delete {folder}, and make it anew.") from None
    if read_subject(folder / SUBJECT_FILE) != item:
        raise MoLEError(
            f"{folder / SUBJECT_FILE} is of another subject, made with another seed. Choose another folder."
        )
    if said is None:
        return
    try:
        there = parse_json(said)
    except MoLEError:
        there = None
    if there != trained_with:
        raise MoLEError(
            f"{lora} was trained with something else: {differences(there, trained_with)}. Give the same, or choose "
            "another folder."
        )
