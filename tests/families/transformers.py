"""Cases of the contract with the tiny transformers."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from tests.families.contract import Case
from tests.tiny.dits import MADE, SIZE, tiny_parts

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
