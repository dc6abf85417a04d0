"""Running the tiny Stable Diffusion with LoRAs: shared by the tests of experts and gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.composition import Linear
from mole_diffusion.experts import Experts
from mole_diffusion.lora import LoRA, load_lora
from tests.tiny import ATTENTION, CONVOLUTIONS, FEED_FORWARD, PROJECTIONS, TEXT_ENCODER, random_lora

EVERYTHING = (ATTENTION, FEED_FORWARD, PROJECTIONS, CONVOLUTIONS, TEXT_ENCODER)


def make_lora(components: dict[str, Any], name: str, seed: int, rank: int = 4, **kwargs: Any) -> LoRA:
    state = random_lora(components, rank=rank, seed=seed, **{"targets": EVERYTHING, "alpha": 3.0, **kwargs})
    return load_lora(state, components, name=name)


def models(components: dict[str, Any]) -> dict[str, nn.Module]:
    return {name: components[name] for name in ("unet", "text_encoder")}


def unet_inputs(batch: int = 2, size: int = 16, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    return {
        "sample": torch.randn(batch, 4, size, size, generator=generator).to(dtype),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 16, 32, generator=generator).to(dtype),
    }


def inputs_of(module: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a module of a UNet may be given, two samples of it."""
    if isinstance(module, nn.Conv2d):
        return torch.randn(2, module.in_channels, 6, 4).to(dtype)
    return torch.randn(2, 5, module.in_features).to(dtype)


def in_float64(components: dict[str, Any]) -> dict[str, Any]:
    """The models in double precision, where an order of sums makes no difference worth a tolerance."""
    components["unet"].double()
    components["text_encoder"].double()
    return components


def run_unet(components: dict[str, Any], **kwargs: Any) -> Tensor:
    inputs = unet_inputs(dtype=components["unet"].dtype)
    return components["unet"](**{**inputs, **kwargs}).sample


def run_text(components: dict[str, Any]) -> Tensor:
    return components["text_encoder"](torch.tensor([[3, 5, 8, 13, 2, 1], [2, 7, 1, 8, 2, 8]])).last_hidden_state


@contextmanager
def summed(components: Mapping[str, nn.Module], *loras: LoRA) -> Iterator[Experts]:
    """Models with LoRAs on them, whose plain sum acts inside the block."""
    experts = Experts(list(loras))
    experts.attach(components)
    try:
        experts.weigher = Linear()
        yield experts
    finally:
        experts.detach()
