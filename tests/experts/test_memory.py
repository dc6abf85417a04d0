"""Where the factors lie: once, on the model's device, and nowhere when it has gone."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mole_diffusion.experts import Experts
from mole_diffusion.lora import LoRA
from tests.running import make_lora, models, run_text, run_unet, unet_inputs
from tests.tiny import tiny_components
from tests.weighing import Numbers


@pytest.fixture
def tiny() -> dict[str, Any]:
    return tiny_components()


@pytest.fixture
def loras(tiny: dict[str, Any]) -> list[LoRA]:
    return [make_lora(tiny, name, seed, rank=rank) for seed, (name, rank) in enumerate((("cat", 3), ("boot", 5)))]


@pytest.fixture
def experts(tiny: dict[str, Any], loras: list[LoRA]) -> Iterator[Experts]:
    experts = Experts(loras)
    experts.attach(models(tiny))
    experts.weigher = Numbers(torch.ones(2))
    yield experts
    experts.detach()


def factors_of(loras: list[LoRA]) -> list[Tensor]:
    return [
        tensor
        for lora in loras
        for modules in lora.factors.values()
        for pair in modules.values()
        for tensor in (pair.down, pair.up)
    ]


def ready(experts: Experts) -> list[Tensor]:
    return [tensor for site in experts.sites.values() for tensor in site.group.ready]


def storages(tensors: list[Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@torch.no_grad()
def test_factors_are_in_memory_once_and_stay_what_they_were(
    tiny: dict[str, Any], loras: list[LoRA], experts: Experts
) -> None:
    before, fingerprints = [tensor.clone() for tensor in factors_of(loras)], [lora.fingerprint for lora in loras]
    run_unet(tiny), run_text(tiny)
    after = factors_of(loras)
    needed = sum(tensor.numel() * 4 for tensor in before)
    assert sum(storages([*after, *ready(experts)]).values()) == needed
    assert all(torch.equal(a, b) and a.shape == b.shape for a, b in zip(before, after, strict=True))
    for lora in loras:
        lora.__dict__.pop("fingerprint")
    assert [lora.fingerprint for lora in loras] == fingerprints


@torch.no_grad()
def test_a_cast_copy_goes_with_the_loras(tiny: dict[str, Any], loras: list[LoRA], experts: Experts) -> None:
    tiny["unet"].to(torch.bfloat16)
    tiny["unet"](**unet_inputs(dtype=torch.bfloat16))
    made = [weakref.ref(tensor) for site in experts.sites.values() for tensor in site.group.ready]
    assert made
    assert all(tensor.dtype == torch.float32 for tensor in factors_of(loras))
    experts.detach()
    assert all(tensor() is None for tensor in made)


@torch.no_grad()
def test_nothing_stays_where_a_component_has_left(tiny: dict[str, Any], experts: Experts) -> None:
    run_unet(tiny)
    of_unet = [site.group for site in experts.sites.values() if site.component == "unet"]
    assert all(group.ready for group in of_unet)
    tiny["unet"].to("meta")  # stands in for the CPU that offloading moves it to
    run_text(tiny)
    assert not any(group.ready for group in of_unet)
    assert all(site.group.ready for site in experts.sites.values() if site.component == "text_encoder")


@torch.no_grad()
@pytest.mark.parametrize("keep", [(1, 1), (0, 1)])
def test_a_pass_that_ends_early_keeps_no_input(tiny: dict[str, Any], experts: Experts, keep: tuple[int, int]) -> None:
    def stop(module: Any, args: Any) -> None:
        raise RuntimeError("stopped")

    value = next(module for name, module in tiny["unet"].named_modules() if name.endswith("attn1.to_v"))
    handle = value.register_forward_pre_hook(stop)
    given = unet_inputs()
    states: list[weakref.ref[Tensor]] = []
    query = next(module for name, module in tiny["unet"].named_modules() if name.endswith("attn1.to_q"))
    seen = query.register_forward_hook(lambda module, args, output: states.append(weakref.ref(args[0])))
    with experts.using(keep=torch.tensor(keep)), pytest.raises(RuntimeError, match="stopped"):
        tiny["unet"](**given)
    handle.remove(), seen.remove()
    assert states
    assert all(state() is None for state in states)
