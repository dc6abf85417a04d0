"""What a compiled graph computes itself is what hooks add; which kind of graph suits whom."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from mole_diffusion.composition import COMPOSITIONS, Call, Masks
from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import Experts, graphs
from mole_diffusion.experts.adding import add_experts
from mole_diffusion.experts.kinds import MOST_LORAS, Kinds
from tests.families.contract import NAMES, Case, assert_same, draw, lora_state
from tests.families.test_flux import TestFlux as Flux
from tests.families.test_z_image import TestZImage as ZImage
from tests.running import make_lora, models
from tests.tiny import ATTENTION, CONVOLUTIONS, tiny_components
from tests.weighing import Numbers


class Stripes(Numbers):
    """Weighs every other token more."""

    of_places = True

    def weigh(self, site: Any, projections: Any, run: Any) -> torch.Tensor:
        tokens = 1 + torch.arange(projections.tokens)[:, None] % 2
        return super().weigh(site, projections, run) * tokens


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return tiny_components()


@pytest.fixture(scope="module")
def experts(tiny: dict[str, Any]) -> Any:
    """Of several ranks and scalings, and not all at all modules."""
    loras = [
        make_lora(tiny, "cat", 0, rank=3),
        make_lora(tiny, "boot", 1, rank=2, alpha=1.0, targets=(ATTENTION,)),
        make_lora(tiny, "mug", 2, rank=4, targets=(ATTENTION, CONVOLUTIONS)),
    ]
    experts = Experts(loras)
    experts.attach(models(tiny))
    yield experts
    experts.detach()


def inputs_of(module: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if isinstance(module, nn.Conv2d):
        return torch.randn(2, module.in_channels, 6, 4).to(dtype)
    return torch.randn(2, 5, module.in_features).to(dtype)


@pytest.mark.parametrize(
    "weigher", [COMPOSITIONS["linear"](), COMPOSITIONS["budget"](), Stripes(torch.tensor([0.5, 1.0, 2.0]))]
)
@torch.no_grad()
def test_every_module_gives_what_it_gives_with_a_hook(experts: Experts, weigher: Any) -> None:
    keep, call = torch.tensor([[1, 1, 1], [0, 1, 1]]), Call(experts.names, ("subject",) * 3)
    for scale in (torch.tensor([1.0, 0.3, 2]), torch.tensor([1.0, 2, 0.3])):  # may change within a call
        with experts.using(keep, scale, weigher, call):
            for site in experts.sites.values():
                x, run = inputs_of(site.module), experts.run(site.component)
                output = type(site.module).forward(site.module, inputs_of(site.module))
                before = output.clone()
                expected = add_experts(site, x, output.clone(), run)
                found = graphs.add(site.callback, site.module, x, output)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
                assert site.callback.factors is not None
                assert torch.equal(output, before)  # the compiler writes in place where it may
                assert (expected - before).abs().max() > 1e-3


def test_factors_are_those_of_hooks_and_go_with_the_loras(tiny: dict[str, Any]) -> None:
    """No copy of them in memory, and none left."""
    experts = Experts([make_lora(tiny, "cat", 0)])
    experts.attach(models(tiny))
    experts.weigher = COMPOSITIONS["linear"]()
    site = next(site for name, site in experts.sites.items() if name.endswith("attn1.to_k"))
    callback = site.callback
    assert callback is not None
    with torch.no_grad():
        graphs.add(callback, site.module, x := inputs_of(site.module), site.module(x))
    assert callback.factors is not None
    ready = {tensor.data_ptr() for tensor in site.group.ready}
    assert {callback.factors.down.data_ptr(), callback.factors.up.data_ptr()} <= ready
    tiny["unet"].to(torch.bfloat16)
    with torch.no_grad():
        x = inputs_of(site.module, torch.bfloat16)
        base = nn.Linear.forward(site.module, x)
        found = graphs.add(callback, site.module, x, base.clone())
        exact = add_experts(site, x, base.clone(), experts.run("unet"))
    assert callback.factors.up.dtype == found.dtype == torch.bfloat16
    assert (found - exact).float().norm() < 0.01 * (exact - base).float().norm()
    tiny["unet"].to(torch.float32)
    experts.detach()
    assert callback.factors is None


@torch.no_grad()
def test_a_convolution_that_pads_otherwise_is_refused(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    site = next(site for name, site in experts.sites.items() if name.endswith("conv1"))
    with experts.using(weigher=COMPOSITIONS["linear"]()):
        output = site.module(x := inputs_of(site.module))
        monkeypatch.setattr(site.module, "padding_mode", "circular")
        with pytest.raises(MoLEError, match="padding_mode='circular' now"):
            graphs.add(site.callback, site.module, x, output)


def test_a_gradient_goes_through(experts: Experts) -> None:
    site = next(site for name, site in experts.sites.items() if name.endswith("attn1.to_q"))
    weight = site.module.weight
    x = inputs_of(site.module).requires_grad_()
    with experts.using(weigher=Stripes(torch.ones(3))):
        given = graphs.add(site.callback, site.module, x, x @ weight.t())
        expected = add_experts(site, x, x @ weight.t(), experts.run("unet"))
    (found,), (wanted,) = (torch.autograd.grad(y.square().sum(), x) for y in (given, expected))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_the_kind_suits_everybody_who_draws() -> None:
    linear, budget, masks = COMPOSITIONS["linear"](), COMPOSITIONS["budget"](), Masks()
    gates = Numbers(torch.ones(3))
    kinds = Kinds(3)
    assert kinds.now == "modules"  # the base alone
    kinds.settle(gates)
    assert kinds.now == "any"
    with kinds.drawing(budget, gates):
        assert kinds.now == "modules"
    with kinds.drawing(linear, gates):
        assert kinds.now == "modules"
        with kinds.drawing(masks, gates):
            assert kinds.now == "places"
            with kinds.drawing(gates, gates):
                assert kinds.now == "any"
            with kinds.drawing(budget, gates):  # of modules, where masks are of places
                assert kinds.now == "any"
            with kinds.drawing(None, gates):
                assert kinds.now == "any"
        assert kinds.now == "modules"
    assert kinds.now == "any"
    assert Kinds(MOST_LORAS).now == "modules"
    assert Kinds(MOST_LORAS + 1).now == "any"


class MasksOfModules(Masks):
    def weigh(self, site: Any, projections: Any, run: Any) -> Any:
        return super().weigh(site, projections, run)


def test_a_method_that_looks_at_modules_is_of_no_place() -> None:
    with Kinds(3).drawing(method := MasksOfModules(), None):
        assert not method.of_places
    assert Masks().of_places


@pytest.mark.slow
@pytest.mark.parametrize("case", [Flux.case, ZImage.case], ids=["flux", "z_image"])
def test_compiled_blocks_of_transformers_draw_the_same(case: Case) -> None:
    """Also where some modules are given the tokens of all samples one after another, which Python sets apart."""
    torch._dynamo.reset()
    pipe, other = case.pipe(), case.pipe()
    for one in (pipe, other):
        one.load_loras({name: lora_state(one, seed) for seed, name in enumerate(NAMES)})
        one.set_composition("budget")
    expected = draw(case, other)
    transformer = pipe.transformer  # of which nothing ran before
    transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert_same(draw(case, pipe), expected)
    blocks = tuple(name for name, module in transformer.named_modules() if module._compiled_call_impl is not None)
    for site in pipe.experts.sites.values():
        if site.module_name.startswith(blocks):
            assert site.callback is not None
            assert site.callback.factors is not None, site.name
    torch._dynamo.reset()


@torch.no_grad()
def test_a_graph_of_another_kind_is_refused_and_the_remedy_helps(experts: Experts) -> None:
    """A method that was set for all threads does not count while others draw with theirs."""
    site = next(site for name, site in experts.sites.items() if name.endswith("attn1.to_q"))
    x = inputs_of(site.module)
    base = nn.Linear.forward(site.module, x)
    drawing, over = threading.Event(), threading.Event()

    def draw() -> None:
        with experts.using(weigher=COMPOSITIONS["linear"]()):
            drawing.set()
            over.wait()

    thread = threading.Thread(target=draw)
    thread.start()
    drawing.wait()
    experts.weigher = gates = Numbers(torch.ones(3))
    try:
        with pytest.raises(MoLEError, match=r"in one thread while another ran the compiled unet without.*using\(weigh"):
            graphs.add(site.callback, site.module, x, base.clone())
        with experts.using(weigher=gates):
            found = graphs.add(site.callback, site.module, x, base.clone())
            expected = add_experts(site, x, base.clone(), experts.run("unet"))
    finally:
        over.set()
        thread.join()
        experts.weigher = None
    torch.testing.assert_close(found, expected)
