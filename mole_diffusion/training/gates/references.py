"""Pictures of each concept for CLIP to compare with: the user's, or those its LoRA draws alone, drawn once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.errors import MoLEError
from mole_diffusion.files import atomic_path, file_name
from mole_diffusion.pictures import as_seen, read_picture
from mole_diffusion.training.engine.checkpoint import content_hash, parts_of_base
from mole_diffusion.training.engine.randomness import step_generator
from mole_diffusion.training.gates.concepts import Concept
from mole_diffusion.training.gates.config import GateTrainingConfig

STEPS = 25


def reference_pictures(
    pipe: Any, config: GateTrainingConfig, concepts: Mapping[str, Concept], cache: Path | None
) -> dict[str, list[Tensor]]:
    """Every concept's pictures, (1, 3, height, width) in [0, 1], by the name of its LoRA.

    Args:
        pipe: A MoLE pipeline with the LoRAs loaded; afterwards its composition and gates are as before.
        config: How many pictures to draw where a concept has none, their guidance, size and seed.
        concepts: What each LoRA stands for, by its name.
        cache: Folder for drawn pictures; they are drawn once for a LoRA, base, caption and seed. None keeps none.
    """
    base = ""
    if cache is not None:
        base = content_hash(one for part in parts_of_base(pipe).values() for one in part)
    pictures = {}
    for name, concept in concepts.items():
        own = list(concept.references) or _drawn(pipe, config, name, concept, cache, base)
        pictures[name] = [_as_tensor(picture) for picture in own]
    return pictures


def reference_features(clip: DifferentiableCLIP, pictures: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """CLIP features of every concept's pictures, (pictures, width), by the name of its LoRA."""
    return {name: torch.cat([clip.encode_image(one) for one in own]) for name, own in pictures.items()}


@torch.no_grad()
def _drawn(
    pipe: Any, config: GateTrainingConfig, name: str, concept: Concept, cache: Path | None, base: str
) -> list[Image.Image]:
    """Pictures that the LoRA of a concept draws alone, at weight 1."""
    prompt = f"a photo of a {concept.token} {concept.class_name}"
    files = []
    if cache is not None:
        lora = next(lora for lora in pipe.experts.loras if lora.name == name)
        size = "" if config.resolution is None else f" {config.resolution}"
        how = f"{STEPS} {config.picture_guidance_scale}{size}"
        key = content_hash([lora.fingerprint, prompt, str(config.seed), how, base])[:16]
        # The name of a LoRA leads nowhere: it is no part of the name of a file as it is.
        files = [cache / f"{file_name(name)}-{key}-{k}.png" for k in range(config.reference_pictures)]
        drawn = [_whole(file) for file in files]
        if all(picture is not None for picture in drawn):
            return [picture for picture in drawn if picture is not None]
    composition, bar = pipe._loaded.composition, getattr(pipe, "_progress_bar_config", {})
    try:
        pipe.set_composition("linear")
        pipe.set_progress_bar_config(disable=True)
        pictures = [
            pipe(
                prompt,
                loras=[name],
                num_inference_steps=STEPS,
                guidance_scale=config.picture_guidance_scale,
                height=config.resolution,
                width=config.resolution,
                generator=step_generator(config.seed, k),
            ).images[0]
            for k in range(config.reference_pictures)
        ]
    finally:
        pipe.set_composition(composition)
        pipe.set_progress_bar_config(**bar)
    for file, picture in zip(files, pictures, strict=False):
        with atomic_path(file) as temporary:
            picture.save(temporary)
    return pictures


def _whole(file: Path) -> Image.Image | None:
    """A picture that was drawn before; None where there is none, or not the whole of it."""
    try:
        return read_picture(file)
    except MoLEError:
        return None


def _as_tensor(picture: Image.Image) -> Tensor:
    """(1, 3, height, width) in [0, 1]; one by one, since a user's pictures differ in size."""
    pixels = torch.from_numpy(np.array(as_seen(picture)))
    return pixels.permute(2, 0, 1)[None].float() / 255
