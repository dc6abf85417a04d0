"""What the rooms ask of a model: in which order it runs, which modules read one tensor, and who knows it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import Experts
from mole_diffusion.families import FAMILIES, architecture_of, canonical_name, family_of
from mole_diffusion.families.norms import is_norm
from mole_diffusion.families.parts import every_module
from mole_diffusion.lora import LoRA, LoRAFactors
from tests.gating.test_transformers import flux, sd3
from tests.running import unet_inputs
from tests.tiny import tiny_components
from tests.tiny.dits import denoiser_call


def unet() -> tuple[nn.Module, dict[str, Any]]:
    return tiny_components()["unet"], unet_inputs()


TRANSFORMERS = [functools.partial(denoiser_call, name) for name in ("flux2_klein", "z_image", "krea2", "qwen_image")]


def calls_of(model: nn.Module, inputs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The modules that LoRAs change as a forward pass reaches them, each with what it was given."""
    calls: list[tuple[str, Tensor]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) or is_norm(module):
            module.register_forward_hook(lambda _, args, __, name=name: calls.append((name, args[0])))
    with torch.no_grad():
        model(**inputs)
    return calls


@pytest.mark.parametrize("make", [unet, sd3, flux, *TRANSFORMERS])
def test_the_firing_order_is_that_of_a_forward_pass(make: Any) -> None:
    model, inputs = make()
    known = architecture_of(model)
    # Every block of a UNet projects the same time embedding; where in the block does not matter to any gate.
    fired = [canonical_name(name) for name, _ in calls_of(model, inputs) if "time_emb_proj" not in name]
    assert len(fired) > 10
    assert sorted(fired, key=known.firing_order) == fired


@pytest.mark.parametrize("make", [unet, sd3, flux, *TRANSFORMERS])
def test_sites_are_grouped_exactly_where_a_forward_pass_gives_them_one_tensor(make: Any) -> None:
    model, inputs = make()
    component = "unet" if make is unet else "transformer"
    factors = {
        name: LoRAFactors(torch.randn(2, module.in_features), torch.randn(module.out_features, 2))
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) and architecture_of(model).layer(name)) or name.endswith("proj_mlp")
    }
    experts = Experts([LoRA("a", "<test>", "diffusers", "a" * 64, {component: factors})])
    experts.attach({component: model})
    grouped = {
        frozenset(member.module_name for member in site.group.sites)
        for site in experts.sites.values()
        if len(site.group.sites) > 1
    }
    experts.detach()
    calls = [(name, given) for name, given in calls_of(model, inputs) if name in factors]
    # Of one layer: cross-attention layers are all given the prompt, each with a projection of its own.
    together: dict[tuple[int, str | None], set[str]] = {}
    for name, given in calls:
        together.setdefault((id(given), architecture_of(model).block(name)), set()).add(name)
    expected = {frozenset(names) for names in together.values() if len(names) > 1}
    assert grouped == expected


def test_unknown_models_and_pipelines_are_refused_by_name() -> None:
    vae = AutoencoderKL(block_out_channels=(32,))
    with pytest.raises(MoLEError, match=r"AutoencoderKL is a kind of model that is not known here.*UNet2DConditionMod"):
        architecture_of(vae)
    with pytest.raises(MoLEError, match=r"neither unet nor transformer is of no family.*FLUX\.1"):
        family_of({"vae": vae})
    with pytest.raises(MoLEError, match=r"unet \(AutoencoderKL\) is of no family"):
        family_of({"unet": vae})


def test_a_family_is_found_by_its_denoiser() -> None:
    for make, component, name in ((unet, "unet", "stable-diffusion"), (flux, "transformer", "flux")):
        family = family_of({component: make()[0], "vae": None})
        assert (family.name, family.denoiser) == (name, component)
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)


def test_every_module_is_found_also_below_empty_places() -> None:
    model = nn.Sequential(nn.ModuleList(), nn.ModuleDict({"a": nn.Sequential(nn.Linear(1, 1)), "b": nn.ReLU()}))
    model.register_module("none", None)
    assert {id(module) for module in every_module(model)} == {id(module) for module in model.modules()}
    assert every_module(model)[0] is model
