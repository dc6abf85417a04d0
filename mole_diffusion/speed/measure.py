"""The measuring: one process, sides interleaved round by round, processor time and the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from ..benchmark.memory import call_memory
from ..experts import Experts
from .config import Side, SpeedConfig
from .counted import Counted
from .models import component_of, load_into_peft, make_inputs, make_loras, make_model, state_dict, twin
from .pipeline import PipelineCost, pipeline_costs
from .ratio import Ratio
from .sides import make_sides
from .train import TrainingCost, training_costs

Told = Callable[[str], None]


@dataclass(frozen=True)
class SideCost:
    """One side with one number of LoRAs.

    Attributes:
        side: Its name.
        loras: How many are loaded.
        seconds: Of processor time for a call, median; on a GPU of the clock.
        processor: Processor time over that of the bare model.
        clock: The same by the clock.
        operations: Multiplications and additions of its products over those of the bare model: no arithmetic does
            with less where nothing is merged.
        bytes: What it reads and writes over the same of the bare model, counted operator by operator.
        products: How many products of two tensors.
        operators: How many operators at all, of which each takes a moment of Python and of a GPU's queue.
        memory: MiB at the peak of a call beyond weights and inputs; `None` where nobody knows.
    """

    side: Side
    loras: int
    seconds: float
    processor: Ratio
    clock: Ratio
    operations: float
    bytes: float
    products: int
    operators: int
    memory: float | None


@dataclass(frozen=True)
class Setting:
    """What is done once: seconds to put LoRAs on a model, ours and diffusers'; milliseconds for another choice of them.

    Attributes:
        loras: How many.
        load: Ours: checked, stacked and hung.
        load_peft: `load_lora_adapter` of diffusers, one after another; `None` where peft is no side.
        choice_first: Milliseconds for a hundred adapted modules when a choice of LoRAs is used for the first time.
        choice_again: The same when it was used before.
    """

    loras: int
    load: float
    load_peft: float | None
    choice_first: float
    choice_again: float


@dataclass
class Speed:
    """What was measured.

    Attributes:
        config: How.
        device: On what, in words.
        parameters: Of the model.
        sites: Adapted modules.
        rows: One for each side and number of LoRAs.
        settings: One for each number of LoRAs.
        training: Steps of gate training, where they were asked for.
        pipeline: Whole calls of the toybox's pipeline, where they were asked for.
        not_compiled: What torch said where it could not compile, say for want of a C++ compiler; no rows then.
    """

    config: SpeedConfig
    device: str
    parameters: int
    sites: int
    rows: list[SideCost] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    training: list[TrainingCost] = field(default_factory=list)
    pipeline: list[PipelineCost] = field(default_factory=list)
    not_compiled: str | None = None


def measure_speed(config: SpeedConfig, tell: Told | None = None) -> Speed:
    """Measures what composing costs on one model.

    Random weights and shapes of real models. All sides take turns in one process, so that what else the machine does
    meets all of them; every ratio is of one round.

    Args:
        config: What to measure.
        tell: Called with what comes next, before it.

    Returns:
        The table; `speed_page` writes it down.
    """
    tell = tell or (lambda text: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        tell("model")
        model = make_model(config)
        inputs = make_inputs(config, model)
        speed = Speed(config, _device(config), sum(p.numel() for p in model.parameters()), 0)
        try:
            for number in config.loras:
                _measure(speed, model, inputs, number, tell)
        except TorchDynamoException as error:
            speed.not_compiled = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if config.train:
            tell("training")
            speed.training = training_costs(config, model, inputs, min(config.loras))
        if config.pipeline:
            speed.pipeline = pipeline_costs(config.rounds, tell)
    finally:
        torch.set_num_threads(threads)
    return speed


def _measure(speed: Speed, model: Any, inputs: dict[str, Any], number: int, tell: Told) -> None:
    config = speed.config
    loras = make_loras(config, model, number)
    tell(f"{number} LoRAs: loading")
    speed.settings.append(_setting(config, model, loras))
    sides, experts = make_sides(config, model, inputs, loras)
    plain, others = sides, experts
    if config.compiled:  # who counts what torch does cannot look into a compiled graph
        plain, others = make_sides(replace(config, compiled=False), model, inputs, loras)
    speed.sites = len(experts.sites)
    with torch.no_grad():
        counts, memory = {}, {}
        for side, call in sides.items():
            tell(f"{number} LoRAs: counting {side}")
            for ready in {call, plain[side]}:
                ready()  # makes what is made once
            with Counted() as counts[side]:
                plain[side]()
            memory[side] = call_memory(call, torch.device(config.device))
        processor: dict[Side, list[float]] = {side: [] for side in sides}
        clock: dict[Side, list[float]] = {side: [] for side in sides}
        for turn in range(config.rounds):
            tell(f"{number} LoRAs: round {turn + 1} of {config.rounds}")
            for side, call in sides.items():
                spent, passed = _timed(call, config.device)
                processor[side].append(spent)
                clock[side].append(passed)
    bare = counts["bare"]
    for side in sides:
        if side not in config.sides:
            continue
        times = processor[side] if config.device == "cpu" else clock[side]
        speed.rows.append(
            SideCost(
                side,
                number,
                float(np.median(times)),
                Ratio.between(processor[side], processor["bare"]),
                Ratio.between(clock[side], clock["bare"]),
                counts[side].operations / bare.operations,
                counts[side].bytes / bare.bytes,
                counts[side].count,
                counts[side].operators,
                memory[side],
            )
        )
    experts.detach()
    others.detach()


def _timed(call: Callable[[], Any], device: str) -> tuple[float, float]:
    if device != "cpu":
        torch.cuda.synchronize()
    processor, clock = time.process_time(), time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.process_time() - processor, time.perf_counter() - clock


def _setting(config: SpeedConfig, model: Any, loras: list[Any]) -> Setting:
    component = component_of(config)
    ours = twin(model)
    begin = time.process_time()
    experts = Experts(loras)
    experts.attach({component: ours})
    probe = torch.empty(1, device=config.device, dtype=model.dtype)
    _make_ready(experts, None, probe)
    load = time.process_time() - begin
    sites = len(experts.sites)
    first = again = 0.0
    if len(loras) > 1:
        kept = (0,) if len(loras) == 2 else (0, 2)
        first, again = (_spent(lambda: _make_ready(experts, kept, probe)) for _ in range(2))
    experts.detach()
    load_peft = None
    if "peft" in config.sides:
        other, states = twin(model), {lora.name: state_dict(lora, component) for lora in loras}
        load_peft = _spent(lambda: load_into_peft(other, states))
    return Setting(len(loras), load, load_peft, *(1e5 * t / sites for t in (first, again)))


def _make_ready(experts: Experts, kept: tuple[int, ...] | None, probe: Tensor) -> None:
    for site in experts.sites.values():
        site = site if kept is None else site.only(kept)
        site.group.make_ready(probe)


def _spent(action: Callable[[], None]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


def _device(config: SpeedConfig) -> str:
    if config.device != "cpu":
        return torch.cuda.get_device_name(config.device)
    return f"CPU, {config.threads} thread{'s' if config.threads > 1 else ''}"
