"""LoRAs merged into weights where weights are constant: the same numbers as beside them, and the base untouched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mole_diffusion.composition import COMPOSITIONS
from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import Experts
from mole_diffusion.lora import LoRA
from mole_diffusion.speed import Counted
from tests.running import make_lora, models, run_text, run_unet
from tests.tiny import tiny_components


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return tiny_components()


@pytest.fixture(scope="module")
def loras(tiny: dict[str, Any]) -> list[LoRA]:
    made = [make_lora(tiny, f"lora{index}", index, rank=rank) for index, rank in enumerate((3, 5, 2))]
    # One of them changes magnitudes and a bias too, at one module.
    name = "mid_block.attentions.0.proj_in"
    module = tiny["unet"].get_submodule(name)
    norms = module.weight.detach().flatten(1).norm(dim=1)
    factors = replace(made[1].factors["unet"][name], magnitude=1.1 * norms[:, None], bias=torch.ones(len(norms)))
    of_unet = {**made[1].factors["unet"], name: factors}
    return [made[0], replace(made[1], factors={**made[1].factors, "unet": of_unet}), made[2]]


@pytest.fixture
def experts(tiny: dict[str, Any], loras: list[LoRA]) -> Any:
    experts = Experts(loras)
    experts.attach(models(tiny))
    experts.weigher = COMPOSITIONS["linear"]()
    yield experts
    experts.detach()


def both(tiny: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return run_unet(tiny), run_text(tiny)


@torch.no_grad()
@pytest.mark.parametrize("method", [name for name, kind in COMPOSITIONS.items() if kind.constant or name == "budget"])
def test_merged_is_what_runs_beside_the_weights(tiny: dict[str, Any], experts: Experts, method: str) -> None:
    experts.weigher = COMPOSITIONS[method]()
    choices = [{}, {"keep": torch.tensor([1, 1, 0]), "scale": torch.tensor([0.5, -1.5, 1])}]
    beside, merged = [], []
    for results in (beside, merged):
        for choice in choices:
            with experts.using(**choice):
                results.append(both(tiny))
        experts.merge()
    with experts.using(keep=torch.zeros(3)):
        base = both(tiny)
    for expected, found in zip(beside, merged, strict=True):
        for one, other, without in zip(expected, found, base, strict=True):
            assert (one - without).abs().max() > 0.01
            torch.testing.assert_close(other, one, atol=1e-5 * float(one.abs().max()), rtol=0)


@torch.no_grad()
def test_a_merged_pass_is_a_bare_one_in_products_and_weights_are_made_once(
    tiny: dict[str, Any], experts: Experts
) -> None:
    with experts.using(keep=torch.zeros(3)), Counted() as bare:
        run_unet(tiny)
    experts.merge()
    run_unet(tiny)
    with Counted() as merged:
        run_unet(tiny)
    assert merged.products == bare.products
    with experts.using(scale=torch.tensor([1.0, 0.5, 1])):
        with Counted() as anew:
            run_unet(tiny)
        with Counted() as again:
            run_unet(tiny)
    assert anew.count > again.count == bare.count


@torch.no_grad()
def test_the_base_is_never_touched(tiny: dict[str, Any], experts: Experts) -> None:
    unet = tiny["unet"]
    before = {name: (value, value.clone()) for name, value in unet.state_dict().items()}
    with experts.using(keep=torch.zeros(3)):
        bare = run_unet(tiny)
    experts.merge()
    run_unet(tiny)
    for name, value in unet.state_dict().items():
        assert value.data_ptr() == before[name][0].data_ptr()
        assert torch.equal(value, before[name][1])
    with experts.using(keep=torch.zeros(3)):
        assert torch.equal(run_unet(tiny), bare)
    beside = run_unet(tiny)
    experts.unmerge()
    assert not any("forward" in vars(module) for module in unet.modules())
    assert not torch.equal(run_unet(tiny), beside)  # the same but for rounding: it runs beside again


@torch.no_grad()
def test_where_weights_differ_from_place_to_place_loras_run_beside(tiny: dict[str, Any], experts: Experts) -> None:
    rows = torch.tensor([[1, 0, 0], [0, 1, 1]])
    with experts.using(keep=rows):
        expected = run_unet(tiny)
    experts.merge()
    with experts.using(keep=rows):
        assert torch.equal(run_unet(tiny), expected)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run_unet(tiny)
    experts.unmerge()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run_unet(tiny), cast)


@torch.no_grad()
def test_a_weight_that_changes_is_merged_anew(tiny: dict[str, Any], experts: Experts) -> None:
    experts.merge()
    before = run_unet(tiny)
    weight = tiny["unet"].mid_block.attentions[0].proj_in.weight
    old = weight.detach().clone()
    weight.mul_(1.5)
    try:
        changed = run_unet(tiny)
        experts.unmerge()
        torch.testing.assert_close(changed, run_unet(tiny), atol=1e-4, rtol=0)
        assert (changed - before).abs().max() > 0.01
    finally:
        weight.copy_(old)


class Stored(Tensor):
    """Numbers that are not what a layer multiplies with, as libraries that quantise have them."""


def test_what_cannot_hold_them_is_refused_and_nothing_is_changed(
    tiny: dict[str, Any], loras: list[LoRA], experts: Experts
) -> None:
    module = tiny["unet"].mid_block.attentions[0].proj_in

    def stand_ins() -> int:
        return sum("forward" in vars(part) for part in tiny["unet"].modules())

    with pytest.raises(MoLEError, match="hang on no model"):
        Experts(loras).merge()
    module.weight.data = module.weight.data.to(torch.bfloat16)
    with pytest.raises(MoLEError, match=r"proj_in is in torch.bfloat16, whose rounding"):
        experts.merge()
    module.weight.data = module.weight.data.float()
    module.forward = module.forward
    with pytest.raises(MoLEError, match="another forward in place"):
        experts.merge()
    del module.forward
    own, module.weight = module.weight, nn.Parameter(module.weight.data.as_subclass(Stored), requires_grad=False)
    with pytest.raises(MoLEError, match="numbers that are quantised or made as they are needed: LoRAs cannot be fused"):
        experts.merge()
    module.weight = own
    assert stand_ins() == 0
    experts.merge()
    assert stand_ins() == sum(name.startswith("unet.") for name in experts.sites)
    experts.detach()
    assert stand_ins() == 0
