"""A tiny composing pipeline with three LoRAs, and a picture drawn with it, for the tests of pipelines and methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mole_diffusion.pipelines import MoLEStableDiffusionPipeline
from tests.tiny import ATTENTION, FEED_FORWARD, TEXT_ENCODER, random_lora, tiny_pipeline

NAMES = ("cat", "dog", "mug")
PROMPT = "a cat and a dog"


def lora_states(pipe: Any) -> dict[str, dict[str, Tensor]]:
    """Three LoRAs of different rank and reach; the last leaves the text encoder alone."""
    return {
        "cat": random_lora(pipe.components, rank=4, targets=(ATTENTION, TEXT_ENCODER), seed=1),
        "dog": random_lora(pipe.components, rank=6, targets=(ATTENTION, FEED_FORWARD, TEXT_ENCODER), alpha=3, seed=2),
        "mug": random_lora({"unet": pipe.unet}, rank=2, targets=(ATTENTION, FEED_FORWARD), seed=3),
    }


def composing_pipeline(*names: str, cls: type = MoLEStableDiffusionPipeline) -> Any:
    """A tiny pipeline with the named LoRAs loaded."""
    pipe = tiny_pipeline(cls)
    states = lora_states(pipe)
    if names:
        pipe.load_loras({name: states[name] for name in names})
    return pipe


def draw(pipe: Any, prompt: str | list[str] | None = PROMPT, *, seed: int = 0, **kwargs: Any) -> Tensor:
    """Latents of a two-step run."""
    kwargs = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.manual_seed(seed)} | kwargs
    return pipe(prompt, **kwargs).images


def assert_close(actual: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    """Equal but for the order of float32 sums; latents here reach 8 after guidance of 7.5."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
