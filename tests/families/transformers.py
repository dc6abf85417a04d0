"""Cases of the contract with the tiny transformers, and pipelines of them with two LoRAs."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

import mole_diffusion
from tests.families.contract import Case
from tests.tiny import random_lora
from tests.tiny.dits import MADE, SIZE, tiny_dit, tiny_parts

FAMILIES = list(MADE)
CAPTIONS = ["a cat and a dog", "a red mug and a green boot in the grass with a clock"]
UNGUIDED = {"z_image": {"guidance_scale": 0.0}, "krea2": {"guidance_scale": 0.0}, "qwen_image": {"true_cfg_scale": 1.0}}
REGIONS = {"a": (0, 0, 0.5, 1.0), "b": (0.5, 0, 1.0, 1.0)}

DOWN = FlowMatchEulerDiscreteScheduler(shift=3.0)
"""It goes down the steps of a walk: a shift of its own, not one of the size of a picture."""


def picture(side: int = SIZE) -> Image.Image:
    """A picture to begin with or to look at."""
    return Image.fromarray(np.arange(side * side * 3, dtype=np.uint8).reshape(side, side, 3))


def mask(side: int = SIZE) -> Image.Image:
    """A mask to paint in."""
    return Image.fromarray(np.uint8(np.eye(side) * 255))


class SmallCase(Case):
    """Pipelines whose own size is that of the pictures drawn here, for trainings."""

    def pipe(self, *, stock: bool = False) -> Any:
        made = super().pipe(stock=stock)
        made.default_sample_size = SIZE // 2
        return made


def case(family: str, ours: type, call: dict[str, Any], *, stock: type | None = None, scale: str) -> Case:
    """A pipeline of a family, by default that of text to image."""
    given = {"height": SIZE, "width": SIZE, **call}
    return SmallCase(ours, stock or MADE[family][0], functools.partial(tiny_parts, family), given, scale=scale)


@functools.cache
def loaded(family: str) -> Any:
    """A pipeline of ours with two LoRAs on every Linear of its transformer."""
    pipe = tiny_dit(family, getattr(mole_diffusion, f"MoLE{MADE[family][0].__name__}"))
    parts = {"transformer": pipe.transformer}
    pipe.load_loras({name: random_lora(parts, rank=2, targets=".", seed=seed) for seed, name in enumerate("ab")})
    return pipe


def rows_of(output: Any) -> Tensor:
    """What a transformer predicts, a row for each sample."""
    sample = output[0]
    return torch.stack(list(sample)) if isinstance(sample, list) else sample


def with_triggers(pipe: Any, words: dict[str, str]) -> None:
    pipe._loaded.triggers |= {name: (word,) for name, word in words.items()}
