"""What tests of methods that bind LoRAs to their subjects share: a pipeline of three, a prompt, regions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.composing import composing_pipeline, draw

PROMPT = "a photo of a cat, a dog and a mug"
REGIONS: dict[str, Any] = {"cat": (0, 0, 0.5, 1), "dog": (0.5, 0, 1, 0.5), "mug": (0.5, 0.5, 1, 1)}


def fresh(method: Any = None) -> Any:
    pipe = composing_pipeline("cat", "dog", "mug")
    pipe.set_composition(method)
    return pipe


def four(pipe: Any, prompt: Any = PROMPT, **kwargs: Any) -> Tensor:
    return draw(pipe, prompt, **{"num_inference_steps": 4, **kwargs})


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
