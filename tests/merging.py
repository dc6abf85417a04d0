"""LoRAs added to weights by hand, which every composition is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.lora import LoRA


@torch.no_grad()
def merge(components: Mapping[str, Any], lora: LoRA, weight: float = 1.0) -> None:
    """Adds every change of a loaded LoRA, times `weight`, to the models' own weights."""
    for component, modules in lora.factors.items():
        for name, factors in modules.items():
            target = components[component].get_submodule(name).weight
            target += weight * factors.delta().reshape(target.shape).to(target.dtype)


@torch.no_grad()
def merge_state(pipe: Any, state: dict[str, Tensor], scale: float = 1.0) -> None:
    """Adds a LoRA in diffusers' layout to the weights of a pipeline, by the definition `W + alpha / r * B A`."""
    for key, down in state.items():
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removesuffix(".lora_A.weight")
        component, _, name = path.partition(".")
        module: nn.Module = getattr(pipe, component).get_submodule(name)
        up, rank = state[f"{path}.lora_B.weight"], len(down)
        alpha = float(state.get(f"{path}.alpha", torch.tensor(rank)))
        module.weight += scale * alpha / rank * (up.flatten(1) @ down.flatten(1)).view_as(module.weight)
