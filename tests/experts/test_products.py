"""What LoRAs cost, in products: two a module whatever their number, and none for those that are left out."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

import mole_diffusion
from mole_diffusion.composition import Linear
from mole_diffusion.composition.norms import output_norms
from mole_diffusion.experts import Experts, ExpertStack, Projections, Run, Site
from mole_diffusion.experts.processor import STOCK
from mole_diffusion.experts.site import CHOICES_KEPT, group_sites
from mole_diffusion.families.unet import UNet
from mole_diffusion.lora import LoRA, LoRAFactors
from mole_diffusion.speed import Counted
from mole_diffusion.speed.counted import python_calls
from tests.running import make_lora, models, run_unet, unet_inputs
from tests.tiny import ATTENTION, CONVOLUTIONS, FEED_FORWARD, tiny_components
from tests.weighing import Numbers

RANKS = (3, 5, 2, 7)


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return tiny_components()


@pytest.fixture(scope="module")
def loras(tiny: dict[str, Any]) -> list[LoRA]:
    targets = (ATTENTION, FEED_FORWARD, CONVOLUTIONS)
    return [make_lora(tiny, f"lora{i}", i, rank=rank, targets=targets) for i, rank in enumerate(RANKS)]


def attached(tiny: dict[str, Any], loras: Sequence[LoRA]) -> Experts:
    experts = Experts(loras)
    experts.attach(models(tiny))
    experts.weigher = Numbers(torch.ones(len(loras)))
    return experts


@torch.no_grad()
def test_what_is_left_out_is_not_computed(tiny: dict[str, Any], loras: list[LoRA]) -> None:
    """Every product of two of four LoRAs is that of two LoRAs alone, in number and shape."""
    experts = attached(tiny, loras)
    with experts.using(keep=torch.tensor([1, 0, 0, 1])):
        masked = run_unet(tiny)
        with Counted() as of_four:
            run_unet(tiny)
    with Counted() as all_four:
        everything = run_unet(tiny)
    with experts.using(keep=torch.zeros(4)), Counted() as base:
        run_unet(tiny)
    experts.detach()
    two = attached(tiny, [loras[0], loras[3]])
    with Counted() as of_two:
        alone = run_unet(tiny)
    two.detach()
    assert of_four.products == of_two.products
    assert torch.equal(masked, alone)
    assert all_four.count == of_four.count > base.count
    assert (everything - masked).abs().max() > 0.01


@torch.no_grad()
def test_two_products_a_module_and_one_for_queries_keys_and_values(tiny: dict[str, Any], loras: list[LoRA]) -> None:
    experts = attached(tiny, loras)
    with experts.using(keep=torch.zeros(4)), Counted() as base:
        run_unet(tiny)
    with Counted() as ours:
        run_unet(tiny)
    groups = {id(site.group) for name, site in experts.sites.items() if name.startswith("unet.")}
    sites = [site for name, site in experts.sites.items() if name.startswith("unet.")]
    experts.detach()
    assert ours.count - base.count == len(groups) + len(sites)
    assert len(groups) < len(sites)


@torch.no_grad()
@pytest.mark.parametrize("alike", [False, True])
def test_a_sum_runs_six_operators_a_module(tiny: dict[str, Any], loras: list[LoRA], alike: bool) -> None:
    """View, product, the module's part, weights, view, product; whatever the ranks are.

    Where all LoRAs weigh one number, scalings included, the second product multiplies by it, and it is five.
    """
    if alike:
        loras = [replace(lora, factors=_scaled(lora, 0.5)) for lora in loras]
    experts = attached(tiny, loras)
    experts.weigher = Linear()
    with experts.using(keep=torch.zeros(4)), Counted() as base:
        run_unet(tiny)
    with experts.using():
        run_unet(tiny)
        with Counted() as ours:
            run_unet(tiny)
    sites = [name for name in experts.sites if name.startswith("unet.")]
    experts.detach()
    once = 20 if alike else 40  # the weights themselves, and how they lie at modules that other LoRAs touch
    assert ours.operators - base.operators <= (5 if alike else 6) * len(sites) + once


def _scaled(lora: LoRA, scaling: float) -> dict[str, dict[str, LoRAFactors]]:
    """The factors of a LoRA, at another scaling."""
    return {
        component: {name: replace(factors, scaling=scaling) for name, factors in modules.items()}
        for component, modules in lora.factors.items()
    }


@torch.no_grad()
def test_what_python_does_beside_a_module_is_counted(tiny: dict[str, Any], loras: list[LoRA]) -> None:
    """Its time is all that LoRAs cost a small model, or a GPU that waits for it."""
    experts = attached(tiny, loras)
    experts.weigher = Linear()
    counts, package = [], str(Path(mole_diffusion.__file__).parent)
    for keep in (torch.zeros(4), torch.ones(4)):
        with experts.using(keep=keep):
            run_unet(tiny)
            counts.append(python_calls(lambda: run_unet(tiny), within=package))
    sites = sum(name.startswith("unet.") for name in experts.sites)
    experts.detach()
    empty, ours = counts
    assert empty <= 2.2 * sites
    assert ours <= 12 * sites


@torch.no_grad()
def test_without_loras_attention_is_the_stock_one_and_sizes_are_still_noted(
    tiny: dict[str, Any], loras: list[LoRA]
) -> None:
    bare, small = run_unet(tiny), unet_inputs(size=8)["sample"]
    experts = attached(tiny, loras)
    name = next(name for name in experts.sites if name.startswith("unet.") and name.endswith("attn1.to_q"))
    layer, site, stock = tiny["unet"].get_submodule(name[len("unet.") : -len(".to_q")]), experts.sites[name], 0
    ours = layer.processor

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal stock
        stock += 1
        return type(STOCK).__call__(STOCK, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, experts.using(keep=torch.zeros(4)):
        patch.setattr("mole_diffusion.experts.processor.STOCK", counted)
        layers = sum(layer.processor is not None for layer in tiny["unet"].modules() if isinstance(layer, Attention))
        assert torch.equal(run_unet(tiny), bare)
        assert (stock, site.tokens) == (0, site.input_tokens)  # nobody knew the sizes yet
        tokens = site.tokens
        assert torch.equal(run_unet(tiny), bare)
        assert stock == layers
        run_unet(tiny, sample=small)
        assert (stock, site.tokens) == (layers, tokens // 4)
        layer.to_q = copy.deepcopy(layer.to_q)  # as offloading does; it is looked at anew whether it is reached
        run_unet(tiny, sample=small)
        assert stock == layers
    assert not torch.equal(run_unet(tiny), bare)
    assert layer.processor is ours
    experts.detach()


@torch.no_grad()
def test_nothing_as_large_as_all_outputs_is_made(tiny: dict[str, Any], loras: list[LoRA]) -> None:
    """No tensor of N outputs, and none at all beyond those of the base that is as large as its largest."""
    experts = attached(tiny, loras)
    with experts.using(keep=torch.zeros(4)), Counted() as base:
        run_unet(tiny)
    with Counted() as ours:
        run_unet(tiny)
    experts.detach()
    assert ours.largest == base.largest


def group_of_three(num_loras: int) -> tuple[nn.ModuleDict, dict[str, Site]]:
    attention = nn.ModuleDict({name: nn.Linear(6, 7) for name in ("to_q", "to_k", "to_v")})
    factors = [[LoRAFactors(torch.randn(r, 6), torch.randn(7, r), 0.5) for r in RANKS[:num_loras]] for _ in attention]
    sites = {
        name: Site("unet", name, module, ExpertStack(f, name))
        for (name, module), f in zip(attention.items(), factors, strict=True)
    }
    group_sites(list(sites.values()), attention, UNet())
    return attention, sites


@torch.no_grad()
def test_a_choice_is_made_ready_once_and_few_are_kept() -> None:
    attention, sites = group_of_three(4)
    site, x = sites["to_q"], torch.randn(2, 5, 6)
    output = attention["to_q"](x)
    chosen = site.only((0, 2))
    assert [member.stack.ranks for member in chosen.group.sites] == [(3, 0, 2, 0)] * 3
    projected = chosen.group.project(chosen, x, output).tensors["unet.to_q"]
    full = site.stack.down
    torch.testing.assert_close(projected, x @ full[[0, 1, 2, 8, 9]].T)
    down = chosen.group._down
    chosen.group.let_go()
    again = site.only((0, 2))
    again.group.project(again, x, output)
    assert again is chosen
    assert again.group._down is down  # nothing was copied anew
    for kept in [(0,), (1,), (2,), (3,), (0, 1)]:
        site.only(kept)
    assert len(site.group.chosen) == CHOICES_KEPT
    assert site.only((0, 2)) is not chosen


@torch.no_grad()
def test_a_choice_of_all_that_are_here_copies_nothing() -> None:
    _, sites = group_of_three(2)
    assert sites["to_q"].only((0, 1, 3)) is sites["to_q"]


@torch.no_grad()
def test_where_no_chosen_lora_is_nothing_is_added() -> None:
    attention, sites = group_of_three(2)
    chosen = sites["to_k"].only((3,))
    x = torch.randn(2, 5, 6)
    with Counted() as products:
        projections = chosen.group.project(chosen, x, attention["to_k"](x))
    assert products.count == 1  # the base's own
    assert projections.tensors["unet.to_k"].shape == (2, 5, 0)
    assert output_norms(chosen.stack, projections.rows["unet.to_k"]).shape == (0, 10)


@pytest.mark.parametrize("channels_last", [False, True])
def test_what_is_added_in_place_is_what_autograd_gets(channels_last: bool) -> None:
    module = nn.Conv2d(4, 6, 3, padding=1).double()
    factors = [LoRAFactors(torch.randn(r, 4, 3, 3), torch.randn(6, r, 1, 1), 0.5) for r in RANKS]
    site = Site("unet", "a", module, ExpertStack(factors, "a"))
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    if channels_last:
        x, module = x.to(memory_format=torch.channels_last), module.to(memory_format=torch.channels_last)
    weights = torch.rand(2, 15, 4, dtype=torch.float64)
    outputs = {}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            output = module(x).detach()
            weights.requires_grad_(grad)
            projected = site.group.project(site, x, output).rows["unet.a"]
            outputs[grad] = site.stack.add_to(output, projected, weights)
            assert (outputs[grad] is output) is not grad
    torch.testing.assert_close(outputs[False], outputs[True], atol=1e-12, rtol=1e-12)
    outputs[True].sum().backward()
    assert weights.grad is not None


@torch.no_grad()
def test_rows_that_nobody_else_reads_are_weighed_where_they_lie() -> None:
    """And others are left as they are; in half precision as well, where the product is rounded once."""
    generator = torch.Generator().manual_seed(0)
    for ranks, dtype in ((RANKS, torch.float32), ((3, 3, 3, 3), torch.float32), ((3, 3, 3, 3), torch.bfloat16)):
        factors = [LoRAFactors(*(torch.randn(s, generator=generator) for s in ((r, 4), (6, r)))) for r in ranks]
        stack = ExpertStack(factors, "a")
        z = torch.randn(2 * 5, sum(ranks), generator=generator).to(dtype)
        output = torch.randn(2, 5, 6, generator=generator).to(dtype)
        weights = torch.rand(2, 5, 4, generator=generator)
        kept, spare = z.clone(), z.clone()
        first = stack.add_to(output.clone(), kept, weights)
        second = stack.add_to(output.clone(), spare, weights, spare=True)
        of_ranks = weights[..., stack.expert_of_rank].reshape(z.shape)
        assert torch.equal(kept, z)
        assert torch.equal(spare, (z.float() * of_ranks).to(dtype))
        assert torch.equal(first, second)


class Tokens:
    """Weights for each token, the same at all modules with so many tokens, or others at each module."""

    def __init__(self, of_groups: Collection[str], others: bool) -> None:
        self.of_groups = of_groups
        self._others = others
        self._made: dict[Any, Tensor] = {}

    def weigh(self, site: Site, projections: Projections, run: Run) -> Tensor:
        key = projections.tokens, site.name if self._others else ""
        if key not in self._made:
            seed = zlib.crc32(repr(key).encode())
            self._made[key] = torch.rand(1, key[0], 3, generator=torch.Generator().manual_seed(seed))
        return self._made[key]


@pytest.mark.parametrize(
    ("ranks", "reach"),
    [((4, 4, 4), (ATTENTION,) * 3), ((4, 2, 5), (ATTENTION,) * 3), ((4, 4, 4), (ATTENTION, ATTENTION, r"to_q$"))],
)
@pytest.mark.parametrize("others", [False, True])
@torch.no_grad()
def test_what_is_read_by_several_is_weighed_once_where_that_is_right(
    tiny: dict[str, Any], others: bool, ranks: tuple[int, ...], reach: tuple[str, ...]
) -> None:
    """And a method that only says that it weighs q, k and v alike gets what it gives."""
    given = zip(ranks, reach, strict=True)
    experts = attached(tiny, [make_lora(tiny, f"lora{i}", i, rank=r, targets=(to,)) for i, (r, to) in enumerate(given)])
    drawn, operators = {}, {}
    for of_groups in (False, True):
        experts.weigher = Tokens(experts.sites if of_groups else (), others)
        drawn[of_groups] = run_unet(tiny)
        with Counted() as counted:
            assert torch.equal(run_unet(tiny), drawn[of_groups])
        operators[of_groups] = counted.operators
    groups = [group.sites for group in {site.group for site in experts.sites.values()} if group.several]
    experts.detach()
    torch.testing.assert_close(drawn[True], drawn[False], atol=1e-6, rtol=1e-5)
    if (
        not others and len(set(reach)) == 1
    ):  # an own place, two views and a product for each, or two views and one product for all
        assert operators[False] - operators[True] == sum(4 * len(sites) - 3 for sites in groups if in_unet(sites))


def in_unet(sites: Sequence[Site]) -> bool:
    return sites[0].component == "unet"


class Asked(Linear):
    """Counts how often it is asked for weights."""

    def __init__(self) -> None:
        self.times = 0

    def weights(self, keep: Tensor, step: Any) -> Tensor:
        self.times += 1
        return keep / 2


class AskedEverywhere(Asked):
    """One that answers module by module."""

    def weigh(self, site: Site, projections: Any, run: Any) -> Tensor:
        self.times += 1
        return run.keep[:, None] * (0.5 if site.module_name.endswith("to_q") else 0.0)


@torch.no_grad()
def test_a_method_alike_in_all_modules_is_asked_once_a_pass(tiny: dict[str, Any], loras: list[LoRA]) -> None:
    experts = attached(tiny, loras)
    once, everywhere = Asked(), AskedEverywhere()
    with experts.using(weigher=Numbers(torch.full((4,), 0.5))):
        expected = run_unet(tiny)
    with experts.using(weigher=once):
        torch.testing.assert_close(run_unet(tiny), expected)
        assert once.times == 1
        with experts.using(keep=torch.tensor([1, 0, 0, 0])):  # another pass, another choice
            assert not torch.allclose(run_unet(tiny), expected)
    with experts.using(weigher=everywhere):
        assert not torch.allclose(run_unet(tiny), expected)
    assert everywhere.times >= len([name for name in experts.sites if name.startswith("unet.")])
    experts.detach()
