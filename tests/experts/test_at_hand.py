"""Products that ask tensors for nothing that is the same in each pass, and sums at weights that stay."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from mole_diffusion.composition import Call, Linear, NormRouter
from mole_diffusion.experts import Experts, ExpertStack, Projections, Run, Site, adding
from mole_diffusion.experts.adding import add_experts
from mole_diffusion.experts.at_hand import AtHand
from mole_diffusion.experts.site import CHOICES_KEPT, group_sites
from mole_diffusion.families.unet import UNet
from mole_diffusion.lora import LoRAFactors
from tests.running import make_lora, models, run_unet, unet_inputs
from tests.tiny import ATTENTION, CONVOLUTIONS, FEED_FORWARD, tiny_components


def attached(components: dict[str, Any], targets: tuple[str, ...], alike: bool = False) -> Experts:
    """Four LoRAs of several ranks, with scalings of their own or all with the same."""
    ranks = (3, 5, 2, 7)
    loras = [
        make_lora(components, f"lora{i}", i, rank=rank, targets=targets, alpha=rank / 2 if alike else 3.0)
        for i, rank in enumerate(ranks)
    ]
    experts = Experts(loras)
    experts.attach(models(components))
    experts.weigher = Linear()
    return experts


def draws_alike_elsewhere(tiny: dict[str, Any], passes: Callable[..., Tensor], whole: Tensor) -> None:
    """In other sizes, dtypes and layouts, and back again: at once and in the passes that follow.

    Args:
        tiny: The components.
        passes: Draws several times, and raises where a picture is another, or where it was not drawn `everywhere` by
            what is at hand.
        whole: What it gives.
    """
    assert passes(sample=unet_inputs(size=8)["sample"]).shape[-1] == 8
    with torch.autocast("cpu", torch.bfloat16):
        half = run_unet(tiny)
        assert torch.equal(half, passes(everywhere=False))
    assert torch.equal(run_unet(tiny), whole)
    tiny["unet"].double()
    torch.testing.assert_close(run_unet(tiny).float(), whole, atol=1e-4, rtol=1e-4)
    passes()
    tiny["unet"].float()
    assert torch.equal(passes(), whole)
    tiny["unet"].to(memory_format=torch.channels_last)
    torch.testing.assert_close(run_unet(tiny), whole, atol=1e-5, rtol=1e-5)
    passes()
    tiny["unet"].to(memory_format=torch.contiguous_format)
    passes()


@pytest.mark.parametrize("alike", [False, True])
@torch.no_grad()
def test_a_sum_has_all_that_it_needs_at_hand_and_is_the_same(alike: bool) -> None:
    """As the general way gives it, which serves the first pass: also after other choices, sizes, dtypes and modules."""
    tiny = tiny_components()
    experts = attached(tiny, (ATTENTION, FEED_FORWARD, CONVOLUTIONS), alike)
    generally = 0

    def counted(*args: Any) -> Tensor:
        nonlocal generally
        generally += 1
        return add_experts(*args)

    def passes(everywhere: bool = True, **inputs: Any) -> Tensor:
        nonlocal generally
        for site in experts.sites.values():
            site.sum = None
        drawn = [run_unet(tiny, **inputs) for _ in range(3)]
        generally = 0
        drawn.append(run_unet(tiny, **inputs))
        assert (generally == 1) == everywhere  # the first module, at which weights are asked for
        assert all(torch.equal(drawn[0], other) for other in drawn[1:])
        return drawn[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mole_diffusion.experts.forward_passes.add_experts", counted)
        for keep in (torch.ones(4), torch.tensor([1.0, 0, 1, 0]), torch.tensor([0.0, 1, 0, 0])):
            with experts.using(keep=keep, call=Call(experts.names, ("subject",) * 4)):
                at_once = run_unet(tiny)  # with what was at hand for another choice
                whole = passes()
                assert torch.equal(at_once, whole)
                with experts.using(scale=torch.full((4,), 2.0)):
                    doubled = run_unet(tiny)
                    assert torch.equal(doubled, passes())
                assert not torch.equal(doubled, whole)
                draws_alike_elsewhere(tiny, passes, whole)
        site = next(site for site in experts.sites.values() if site.sum)
        site.group.start_again()
        assert site.sum is site.hand is None
        experts.weigher = Steady(torch.ones(1, 1, 4))
        drawn = []
        for keep in (torch.ones(4), torch.tensor([1.0, 0, 1, 0])):
            with experts.using(keep=keep):
                drawn += [run_unet(tiny), passes()]
        assert torch.equal(drawn[2], drawn[3])
        assert not torch.equal(drawn[0], drawn[2])
    experts.detach()


class Steady:
    """The very same weights in all passes, whoever is left out."""

    alike = True

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights

    def weigh(self, site: Site, projections: Projections, run: Run) -> Tensor:
        return self._weights


class Varied:
    """Other weights at each module, or at each place, in each pass anew."""

    def __init__(self, kind: str, sites: list[Site]) -> None:
        self.of_places = kind == "places"
        self.of_groups = {site.name for site in sites} if kind == "groups" else ()
        self._kind = kind

    def weigh(self, site: Site, projections: Projections, run: Run) -> Tensor | None:
        rows, tokens = projections.batch, projections.tokens
        if self._kind == "numbers":
            rows, tokens = (rows, 1) if "attn1" in site.name else (1, 1)
        made_of = {"places": site.place, "groups": ",".join(site.group.names)}.get(self._kind, site.name)
        if self._kind == "places" and site.halvings == 1:
            return None
        of_tokens = torch.arange(rows * tokens * 4).view(rows, tokens, 4) + sum(map(ord, made_of))
        return (0.5 + of_tokens.sin()) * run.keep[:, None] * run.scale[:, None]


KINDS = ("places", "modules", "groups", "numbers", "norm_router")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_weights_by_token_and_module_find_all_they_need_at_hand(kind: str) -> None:
    """And add what the general way adds, which serves the first pass: also after other choices, sizes and dtypes."""
    tiny = tiny_components()
    experts = attached(tiny, (ATTENTION, FEED_FORWARD, CONVOLUTIONS), alike=kind in ("groups", "norm_router"))
    sites = list(experts.sites.values())
    experts.weigher = NormRouter() if kind == "norm_router" else Varied(kind, sites)
    generally, hands = 0, True
    # Where nothing is added, there is nothing to have at hand.
    nothing = sum(kind == "places" and site.halvings == 1 for site in sites)
    added, hand_of = adding._added, adding._hand

    def counted(*args: Any) -> Tensor:
        nonlocal generally
        generally += args[-1] is None
        return added(*args)

    def passes(everywhere: bool = True, **inputs: Any) -> Tensor:
        nonlocal generally, hands
        drawn = [run_unet(tiny, **inputs) for _ in range(2)]
        generally = 0
        drawn.append(run_unet(tiny, **inputs))
        assert (generally == nothing) == everywhere
        for site in sites:
            site.group.start_again()
        hands = False
        drawn.append(run_unet(tiny, **inputs))
        hands = True
        assert all(torch.equal(drawn[0], other) for other in drawn[1:])
        return drawn[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adding, "_added", counted)
        patch.setattr(adding, "_hand", lambda *args: hand_of(*args) if hands else None)
        for keep in (torch.ones(4), torch.tensor([1.0, 0, 1, 0])):
            with experts.using(keep=keep):
                draws_alike_elsewhere(tiny, passes, passes())
        with torch.enable_grad():
            generally = 0
            run_unet(tiny)
            assert generally == len(sites)
    experts.detach()


def test_a_sum_leaves_alone_what_autograd_needs() -> None:
    """After passes without gradients, of the model and of a part of it that is called alone."""
    components = tiny_components()
    experts = attached(components, (ATTENTION,))
    layer = next(layer for layer in components["unet"].modules() if isinstance(layer, Attention))
    linear: Any = layer.to_out[0]
    linear.forward = lambda x: nn.functional.linear(x, linear.weight, linear.bias).exp()  # whose gradient needs it
    tokens, inputs = torch.randn(2, 5, linear.in_features), unet_inputs()
    with experts.using(call=Call(experts.names, ("subject",) * 4)):
        for given, run in (
            (inputs["sample"], lambda x: run_unet(components, sample=x)),
            (tokens, lambda x: layer(x)),
        ):
            with torch.no_grad():
                expected = [run(given) for _ in range(3)][-1]
            given.requires_grad_()
            drawn = run(given)
            torch.testing.assert_close(drawn, expected)
            drawn.sum().backward()
            assert given.grad.abs().max() > 0
    experts.detach()


def test_what_a_sum_has_at_hand_goes_with_the_choice_it_is_of() -> None:
    experts = attached(tiny_components(), (ATTENTION,))
    site = next(site for site in experts.sites.values() if site.group.several)
    kept = site.only((0, 1))
    kept.hand = AtHand(kept, torch.ones(2, site.stack.out_features))
    site.sum = torch.ones(1, 1, 4), (0, 1), kept.hand, 1.0
    made = weakref.ref(kept.stack)
    del kept
    for others in ((0, 2), (0, 3), (1, 2), (1, 3))[:CHOICES_KEPT]:
        assert made() is not None
        site.only(others)
    gc.collect()
    assert made() is None


@pytest.mark.parametrize("kernel", [(), (1, 1)])
@torch.no_grad()
def test_a_sum_of_those_that_read_one_tensor_is_what_each_adds_alone(kernel: tuple[int, ...]) -> None:
    names = ("to_q", "to_k", "to_v")
    modules = nn.ModuleDict({name: nn.Conv2d(6, 7, 1) if kernel else nn.Linear(6, 7) for name in names})
    sites, given = [], []
    for name, module in modules.items():
        given.append([LoRAFactors(torch.randn(r, 6, *kernel), torch.randn(7, r, *kernel), 0.5 + r) for r in (3, 5)])
        sites.append(Site("unet", name, module, ExpertStack(given[-1], name)))
    group_sites(sites, modules, UNet())
    assert sites[0].group.several
    x, weights = torch.randn(2, *((6, 3, 4) if kernel else (5, 6))), torch.tensor([[[0.5, 2.0]]])
    for site, factors in zip(sites, given, strict=True):
        output, weight = site.module(x), site.module.weight
        change = sum(w * f.delta() for w, f in zip(weights.flatten(), factors, strict=True))
        literal = torch.func.functional_call(site.module, {"weight": weight + change}, (x,))
        added = AtHand(site, output).add(x, output, site.stack.scaled(weights, output.dtype))
        assert added is output
        torch.testing.assert_close(added, literal, atol=1e-5, rtol=1e-5)
