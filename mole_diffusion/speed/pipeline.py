"""Whole calls of a pipeline beside the stock one's: the toybox's, so small that nothing but overhead is seen."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from .. import toybox
from ..pipelines import MoLEStableDiffusionPipeline
from ..training import GateTrainingConfig
from .clocks import in_turn
from .counted import Counted, python_calls
from .limits import with_gates, with_products
from .models import twin
from .ratio import Ratio

LORAS = 3
STEPS = 10


@dataclass(frozen=True)
class PipelineCost:
    """Calls of one pipeline.

    Attributes:
        side: What draws.
        seconds: Of processor time for a step, median.
        processor: Processor time over that of the stock pipeline.
        calls: Functions that ran in Python for a step.
        operators: Operators of torch for a step.
    """

    side: str
    seconds: float
    processor: Ratio
    calls: float
    operators: float


def pipeline_costs(rounds: int, tell: Callable[[str], None], steps: int = STEPS) -> list[PipelineCost]:
    """Draws with the toybox's pipeline and three of its LoRAs, and with diffusers' own without any, taking turns.

    Args:
        rounds: How often each draws.
        tell: Called with what comes next, before it.
        steps: Of each picture.
    """
    tell("pipeline: loading")
    sides = _sides(steps)
    calls, operators = {}, {}
    for side, draw in sides.items():
        tell(f"pipeline: counting {side}")
        draw()
        calls[side] = python_calls(draw)
        with Counted() as counted:
            draw()
        operators[side] = counted.operators
    spent: dict[str, list[float]] = {side: [] for side in sides}
    for turn, order in in_turn(sides, rounds):
        tell(f"pipeline: round {turn + 1} of {rounds}")
        for side in order:
            begin = time.process_time()
            sides[side]()
            spent[side].append(time.process_time() - begin)
    stock = next(iter(sides))
    return [
        PipelineCost(
            side,
            float(np.median(times)) / steps,
            Ratio.between(times, spent[stock]),
            calls[side] / steps,
            operators[side] / steps,
        )
        for side, times in spent.items()
    ]


def _sides(steps: int) -> dict[str, Callable[[], Any]]:
    names = toybox.subjects()[:LORAS]
    prompt = " and ".join(f"a {toybox.token(name)} {toybox.class_name(name)}" for name in names)

    def opened(kind: Any) -> Any:
        """On the very same weights as the others: where they lie in memory makes a difference of a few hundredths."""
        copies = {name: twin(base.components[name]) for name in ("unet", "text_encoder")}
        pipe = kind(**{**base.components, **copies}, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        if kind is MoLEStableDiffusionPipeline:
            pipe.load_loras({name: toybox.lora_path(name) for name in names})
        return pipe

    def limited(gates: bool) -> Any:
        """The stock pipeline with modules that add LoRAs, and nothing around them."""
        pipe, loaded = opened(StableDiffusionPipeline), gated if gates else summed
        everyone = tuple(range(LORAS))
        with_products(pipe.text_encoder, "text_encoder", loaded.experts, everyone)
        if gates:
            with_gates(pipe.unet, "unet", loaded.experts, loaded.gates)
        else:
            with_products(pipe.unet, "unet", loaded.experts, everyone)
        return pipe

    def draw(pipe: Any, **given: Any) -> Callable[[], Any]:
        generator = torch.Generator()
        return lambda: pipe(
            prompt, num_inference_steps=steps, output_type="latent", generator=generator.manual_seed(0), **given
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what diffusers will rename
        base = StableDiffusionPipeline.from_pretrained(toybox.base_dir(), safety_checker=None)
        stock = opened(StableDiffusionPipeline)
        summed, fused, gated = (opened(MoLEStableDiffusionPipeline) for _ in range(3))
    summed.set_composition("linear")
    fused.set_composition("linear")
    fused.fuse_lora()
    gated.init_gates(GateTrainingConfig().gates)
    return {
        "diffusers, no LoRA": draw(stock),
        "`loras=[]`": draw(summed, loras=[]),
        "plain sum": draw(summed),
        "its products alone": draw(limited(gates=False)),
        "sum, fused": draw(fused),
        "gates per token": draw(gated),
        "gates and products alone": draw(limited(gates=True)),
    }
