"""The measuring: one process, sides interleaved round by round, processor time and the clock."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from ..benchmark.memory import call_memory
from ..experts import Experts
from .clocks import QUEUED, busy, in_turn, on_gpu, spent, timed
from .config import Side, SpeedConfig
from .counted import Counted
from .failed import Failed
from .inside import watched
from .models import component_of, load_into_peft, make_inputs, make_loras, make_model, state_dict, twin
from .pipeline import PipelineCost, pipeline_costs
from .ratio import Ratio
from .sides import make_sides
from .train import TrainingCost, training_costs
from .walks import WalkCost, walk_cost

Told = Callable[[str], None]
PIPELINE_ROUNDS = 2  # for each of a model: a call of the pipeline is short


@dataclass(frozen=True)
class SideCost:
    """One side with one number of LoRAs.

    Attributes:
        side: Its name.
        loras: How many are loaded.
        seconds: Of processor time for a call, median; on a GPU by the clock.
        processor: Processor time over that of the bare model; on a GPU until a call is queued.
        clock: The same by the clock; on a GPU until it is done.
        above: How much more of such time it takes than the plain sum, over the bare model's; on a GPU by the clock.
            `None` where the plain sum is no side.
        inside: What it spends at modules on their LoRAs, over a call of the bare model; `None` where nobody looked.
        busy: Seconds that a GPU computes for a call; `None` on a CPU.
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
    above: Ratio | None = None
    busy: float | None = None
    inside: Ratio | None = None


@dataclass(frozen=True)
class Setting:
    """What is done once: seconds to put LoRAs on a model, ours and diffusers'; milliseconds for another choice of them.

    Attributes:
        loras: How many.
        load: Ours: checked, stacked and hung.
        load_peft: `load_lora_adapter` of diffusers, one after another; `None` where peft is no side, or fails.
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
        walk: Whole steps of gate training, where they were asked for.
        pipeline: Whole calls of the toybox's pipeline, where they were asked for.
        not_compiled: What torch said where it could not compile, say for want of a C++ compiler; no rows then.
        failed: Sides that raised, and training steps, in place of whose numbers stands what they said.
    """

    config: SpeedConfig
    device: str
    parameters: int
    sites: int
    rows: list[SideCost] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    training: list[TrainingCost] = field(default_factory=list)
    walk: WalkCost | None = None
    pipeline: list[PipelineCost] = field(default_factory=list)
    not_compiled: str | None = None
    failed: list[Failed] = field(default_factory=list)


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
            # Blocks of one kind share what is compiled of them: every width of both models needs a graph of its own.
            with torch._dynamo.config.patch(recompile_limit=64):
                for number in config.loras:
                    _measure(speed, model, inputs, number, tell)
        except TorchDynamoException as error:
            speed.not_compiled = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if config.train:
            tell("training")
            speed.training = training_costs(config, model, inputs, min(config.loras), speed.failed)
        if config.walks:
            tell("whole training steps")
            try:
                speed.walk = walk_cost(config, min(config.loras))
            except Exception as error:  # the sides' numbers are wanted all the same
                speed.failed.append(Failed.of("whole training step", min(config.loras), error))
        if config.pipeline:
            speed.pipeline = pipeline_costs(PIPELINE_ROUNDS * config.rounds, tell)
    finally:
        torch.set_num_threads(threads)
    return speed


def _measure(speed: Speed, model: Any, inputs: dict[str, Any], number: int, tell: Told) -> None:
    config = speed.config
    loras = make_loras(config, model, number)
    tell(f"{number} LoRAs: loading")
    speed.settings.append(_setting(config, model, loras))
    tell(f"{number} LoRAs: making sides")
    with watched() if config.inside else nullcontext(dict[str, float]()) as at_modules:
        sides, experts = make_sides(config, model, inputs, loras, speed.failed)
    plain, others = sides, experts
    if config.compiled:  # who counts what torch does cannot look into a compiled graph
        plain, others = make_sides(replace(config, compiled=None), model, inputs, loras, [])
    try:
        speed.sites = len(experts.sites)
        counts: dict[Side, Counted] = {}
        memory, computing = {}, {}
        with torch.no_grad():
            for side, call in list(sides.items()):
                tell(f"{number} LoRAs: counting {side}")
                try:
                    for ready in {call, plain[side]}:
                        ready()  # makes what is made once
                    with Counted() as counts[side]:
                        plain[side]()
                    memory[side] = call_memory(call, torch.device(config.device))
                except Exception as error:  # the other sides' numbers are wanted all the same
                    if side == "bare":
                        raise
                    speed.failed.append(Failed.of(side, number, error))
                    del sides[side]
                with suppress(Exception):  # a profiler that cannot be had
                    computing[side] = busy(call, config.device)
            processor: dict[Side, list[float]] = {side: [] for side in sides}
            clock: dict[Side, list[float]] = {side: [] for side in sides}
            inside: dict[Side, list[dict[str, float]]] = {side: [] for side in sides}
            calls = QUEUED if on_gpu(config.device) else 1
            for turn, order in in_turn(sides, config.rounds):
                tell(f"{number} LoRAs: round {turn + 1} of {config.rounds}")
                for side in order:
                    if config.compiled:  # only the first step of a pipeline's call may come after another method's
                        sides[side]()
                    at_modules.clear()
                    of_processor, by_clock = timed(sides[side], config.device, calls)
                    processor[side].append(of_processor)
                    clock[side].append(by_clock)
                    inside[side].append(dict(at_modules))
        bare = counts["bare"]
        for side in sides:
            if side not in config.sides:
                continue
            time = clock if on_gpu(config.device) else processor
            speed.rows.append(
                SideCost(
                    side,
                    number,
                    float(np.median(time[side])),
                    Ratio.between(processor[side], processor["bare"]),
                    Ratio.between(clock[side], clock["bare"]),
                    counts[side].operations / bare.operations,
                    counts[side].bytes / bare.bytes,
                    counts[side].count,
                    counts[side].operators,
                    memory[side],
                    Ratio.above(time[side], time["sum"], time["bare"]) if "sum" in time else None,
                    computing.get(side),
                    Ratio.inside(inside[side], clock["bare"]) if inside[side][0] else None,
                )
            )
    finally:
        experts.detach()
        others.detach()


def _setting(config: SpeedConfig, model: Any, loras: list[Any]) -> Setting:
    component = component_of(config)
    ours = twin(model)
    experts = Experts(loras)
    probe = torch.empty(1, device=config.device, dtype=model.dtype)

    def hang() -> None:
        experts.attach({component: ours})
        _make_ready(experts, None, probe)

    load = spent(hang, config.device)
    sites = len(experts.sites)
    first = again = 0.0
    if len(loras) > 1:
        kept = (0,) if len(loras) == 2 else (0, 2)
        first, again = (spent(lambda: _make_ready(experts, kept, probe), config.device) for _ in range(2))
    experts.detach()
    load_peft = None
    if "peft" in config.sides:
        other, states = twin(model), {lora.name: state_dict(lora, component) for lora in loras}
        with suppress(Exception):  # told when the side is made
            load_peft = spent(lambda: load_into_peft(other, states), config.device)
    return Setting(len(loras), load, load_peft, *(1e5 * t / sites for t in (first, again)))


def _make_ready(experts: Experts, kept: tuple[int, ...] | None, probe: Tensor) -> None:
    for site in experts.sites.values():
        site = site if kept is None else site.only(kept)
        site.group.make_ready(probe)


def _device(config: SpeedConfig) -> str:
    if on_gpu(config.device):
        return torch.cuda.get_device_name(config.device)
    return f"CPU, {config.threads} thread{'s' if config.threads > 1 else ''}"
