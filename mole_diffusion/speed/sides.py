"""The calls that stand beside one another."""

from __future__ import annotations

from collections.abc import Callable
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
from .models import component_of, load_into_peft, merged, state_dict, twin

Sides = dict[Side, Callable[[], Any]]


def make_sides(config: SpeedConfig, model: Any, inputs: dict[str, Any], loras: list[LoRA]) -> tuple[Sides, Experts]:
    """By name, what makes one call of the denoiser; and the experts that ours have."""
    component = component_of(config)
    number = len(loras)
    ours = twin(model)
    experts = Experts(loras)
    experts.attach({component: ours})
    gates = MoLEModel.from_experts(experts, GateTrainingConfig().gates).to(config.device)
    keep = torch.zeros(number)
    keep[: config.used or number] = 1
    linear = COMPOSITIONS["linear"]()
    masks = COMPOSITIONS["masks"]()
    gates.bind(experts)
    call = _call(config, inputs, number) if "masks" in config.sides and component == "unet" else None
    run: Any = torch.compile(ours, fullgraph=True) if config.compiled else ours

    def composed(**using: Any) -> Callable[[], Any]:
        def call_once() -> Any:
            with experts.using(**using):
                return run(**inputs)

        return call_once

    bare = torch.compile(model, fullgraph=True) if config.compiled else model
    sides: Sides = {"bare": lambda: bare(**inputs)}
    if "empty" in config.sides:
        sides["empty"] = composed(keep=torch.zeros(number), weigher=linear)
    if "sum" in config.sides:
        sides["sum"] = composed(keep=keep, weigher=linear, call=_call(config, inputs, number, regions=False))
    for name in ("budget", "norm_router"):
        if name in config.sides:
            call_alone = _call(config, inputs, number, regions=False)
            sides[name] = composed(keep=keep, weigher=COMPOSITIONS[name](), call=call_alone)
    if "gates" in config.sides:
        sides["gates"] = composed(keep=keep, weigher=gates)
    if call is not None:
        sides["masks"] = composed(keep=keep, weigher=masks, call=call)
    if "fused" in config.sides and model.dtype == torch.float32:
        whole_ours, merging = twin(model), Experts(loras)
        merging.attach({component: whole_ours})
        merging.merge()

        def call_fused() -> Any:
            with merging.using(keep=keep, weigher=linear):
                return whole_ours(**inputs)

        sides["fused"] = call_fused
    if "peft" in config.sides:
        other = twin(model)
        load_into_peft(other, {lora.name: state_dict(lora, component) for lora in loras})
        other.set_adapters([lora.name for lora in loras[: config.used or number]])
        other.requires_grad_(False)
        sides["peft"] = lambda: other(**inputs)
    if "merged" in config.sides:
        whole = merged(model, loras[: config.used or number], component)
        sides["merged"] = lambda: whole(**inputs)
    return sides, experts


def _call(config: SpeedConfig, inputs: dict[str, Any], number: int, regions: bool = True) -> Call:
    """A call in which every LoRA has a word of the prompt and, if asked for, a stripe of the picture."""
    tokens = SIZES[config.size].tokens
    names = tuple(f"lora{index}" for index in range(number))
    subject: tuple[Role, ...] = ("subject",)
    of_roles = subject * number
    owned = torch.zeros(1, number, tokens, dtype=torch.bool)
    for index in range(number):
        owned[0, index, 1 + index % (tokens - 1)] = True
    words = PromptWords(owned)
    words.encoded(inputs["encoder_hidden_states"][-1:])
    steps = SimpleNamespace(timesteps=torch.arange(1000, 0, -100), order=1)
    if not regions:
        return Call(names, of_roles, steps, words=words)
    grid = (inputs["sample"].shape[-2], inputs["sample"].shape[-1])
    columns = {name: (index / number, 0, (index + 1) / number, 1) for index, name in enumerate(names)}
    region_map = RegionMap.from_regions(columns, names, image_size=grid, grid=grid)
    return Call(names, of_roles, steps, words=words, regions=region_map)
