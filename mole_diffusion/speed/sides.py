"""The calls that stand beside one another."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch

from ..composition import COMPOSITIONS, Call, RegionMap, Role
from ..composition.prompt import PromptWords
from ..experts import Experts
from ..gating import MoLEModel
from ..lora import LoRA
from ..training import GateTrainingConfig
from .config import SIZES, Side, SpeedConfig
from .failed import Failed
from .limits import with_gates, with_products, with_router
from .models import component_of, load_into_peft, merged, state_dict, twin

Sides = dict[Side, Callable[[], Any]]


def make_sides(
    config: SpeedConfig, model: Any, inputs: dict[str, Any], loras: list[LoRA], failed: list[Failed]
) -> tuple[Sides, Experts]:
    """By name, what makes one call of the denoiser; and the experts that ours have.

    Args:
        config: What is measured.
        model: The denoiser.
        inputs: What it is called with.
        loras: The LoRAs.
        failed: Sides that cannot be made are told here, and are missing in what comes back.
    """
    component = component_of(config)
    number = len(loras)
    ours = twin(model)
    experts = Experts(loras)
    experts.attach({component: ours})
    keep = torch.zeros(number)
    keep[: config.used or number] = 1
    run = _compiled(config, ours)
    bare = _compiled(config, twin(model))

    def chosen(holder: Experts, run: Any, weigher: Any, **using: Any) -> Callable[[], Any]:
        """Steps of one call of a pipeline, which chooses LoRAs once for all of them."""
        call, choice = contextvars.copy_context(), ExitStack()
        using = {"keep": keep, **using}
        if not config.compiled:
            call.run(choice.enter_context, holder.using(weigher=weigher, **using))
            experts.on_detach(lambda: call.run(choice.close))
            return lambda: call.run(lambda: run(**inputs))
        # A graph suits all methods that are drawn with just now: so a side's is told step by step. What else is chosen
        # lies where the model does, so that it stays the same from step to step.
        using |= {"keep": using["keep"].to(config.device), "scale": torch.ones(number, device=config.device)}
        call.run(choice.enter_context, holder.using(**using))
        experts.on_detach(lambda: call.run(choice.close))

        def step() -> Any:
            with holder.using(weigher=weigher):
                return run(**inputs)

        return lambda: call.run(step)

    def called(whole: Any) -> Callable[[], Any]:
        run_whole = _compiled(config, whole)
        return lambda: run_whole(**inputs)

    def composed(name: str, **using: Any) -> Callable[[], Any]:
        return chosen(experts, run, weigher=COMPOSITIONS[name](), **using)

    def made_gates() -> MoLEModel:
        return MoLEModel.from_experts(experts, GateTrainingConfig().gates).to(config.device)

    def weighed() -> Callable[[], Any]:
        gates = made_gates()
        gates.bind(experts)
        return chosen(experts, run, weigher=gates, call=alone())

    def fused() -> Callable[[], Any]:
        whole, merging = twin(model), Experts(loras)
        merging.attach({component: whole})
        experts.on_detach(merging.detach)
        merging.merge()
        return chosen(merging, _compiled(config, whole), weigher=COMPOSITIONS["linear"]())

    def products(joined: bool) -> Callable[[], Any]:
        return called(with_products(twin(model), component, experts, tuple(range(config.used or number)), joined))

    def peft() -> Callable[[], Any]:
        other = twin(model)
        load_into_peft(other, {lora.name: state_dict(lora, component) for lora in loras})
        other.set_adapters([lora.name for lora in loras[: config.used or number]])
        other.requires_grad_(False)
        return called(other)

    def merged_beforehand() -> Callable[[], Any]:
        return called(merged(model, loras[: config.used or number], component))

    def alone() -> Any:
        return _call(config, inputs, number, regions=False)

    makers: dict[Side, Callable[[], Callable[[], Any]]] = {
        "bare": lambda: lambda: bare(**inputs),
        "empty": lambda: composed("linear", keep=torch.zeros(number)),
        "sum": lambda: composed("linear", call=alone()),
        "products": lambda: products(joined=False),
        "joined": lambda: products(joined=True),
        "budget": lambda: composed("budget", call=alone()),
        "norm_router": lambda: composed("norm_router", call=alone()),
        "routed": lambda: called(with_router(twin(model), component, experts)),
        "gates": weighed,
        "gated": lambda: called(with_gates(twin(model), component, experts, made_gates())),
        "masks": lambda: composed("masks", call=_call(config, inputs, number)),
        "fused": fused,
        "peft": peft,
        "merged": merged_beforehand,
    }
    if model.dtype != torch.float32:
        del makers["fused"]
    if config.used:  # these weigh all
        del makers["gated"], makers["routed"]
    sides: Sides = {}
    for side, make in makers.items():
        if side == "bare" or side in config.sides:
            try:
                sides[side] = make()
            except Exception as error:  # the other sides' numbers are wanted all the same
                failed.append(Failed.of(side, number, error))
    return sides, experts


def _compiled(config: SpeedConfig, model: Any) -> Any:
    if config.compiled == "blocks":
        model.compile_repeated_blocks(fullgraph=True)
        return model
    return torch.compile(model, fullgraph=True) if config.compiled == "whole" else model


def _call(config: SpeedConfig, inputs: dict[str, Any], number: int, regions: bool = True) -> Call:
    """A call in which every LoRA has a word of the prompt and, if asked for, a stripe of the picture."""
    size = SIZES[config.size]
    tokens = size.tokens
    names = tuple(f"lora{index}" for index in range(number))
    subject: tuple[Role, ...] = ("subject",)
    of_roles = subject * number
    owned = torch.zeros(1, number, tokens, dtype=torch.bool)
    for index in range(number):
        owned[0, index, 1 + index % (tokens - 1)] = True
    words = PromptWords(owned)
    text = inputs["encoder_hidden_states"] if "encoder_hidden_states" in inputs else torch.stack(inputs["cap_feats"])
    words.encoded(text[-1:])
    steps = SimpleNamespace(timesteps=torch.arange(1000, 0, -100), order=1)
    if not regions:
        return Call(names, of_roles, steps, words=words)
    side = (config.latent or size.latent) // size.patch
    grid = (side, side)
    columns = {name: (index / number, 0, (index + 1) / number, 1) for index, name in enumerate(names)}
    region_map = RegionMap.from_regions(columns, names, image_size=grid, grid=grid)
    return Call(names, of_roles, steps, words=words, regions=region_map)
