"""What a compiled graph computes itself is what hooks add; which kind of graph suits whom."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch
from torch import nn

from mole_diffusion.composition import COMPOSITIONS, Call, NormRouter
from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import AttachError, Experts, graphs
from mole_diffusion.experts.adding import add_experts
from mole_diffusion.families.base import is_compiled
from mole_diffusion.gating import GateConfig, MoLEModel
from tests.families.contract import NAMES, Case, assert_same, draw, lora_state
from tests.families.test_flux import TestFlux as Flux
from tests.families.test_z_image import TestZImage as ZImage
from tests.running import inputs_of, make_lora, models, unet_inputs
from tests.tiny import ATTENTION
from tests.weighing import Numbers


class Stripes(Numbers):
    """Weighs every other token more."""

    of_places = True

    def weigh(self, site: Any, projections: Any, run: Any) -> torch.Tensor:
        tokens = 1 + torch.arange(projections.tokens)[:, None] % 2
        return super().weigh(site, projections, run) * tokens


@pytest.mark.parametrize(
    "weigher",
    [
        COMPOSITIONS["linear"](),
        COMPOSITIONS["budget"](),
        Stripes(torch.tensor([0.5, 1.0, 2.0])),
        NormRouter(),
        NormRouter(temperature=0.5),
    ],
)
@torch.no_grad()
def test_every_module_gives_what_it_gives_with_a_hook(experts: Experts, weigher: Any) -> None:
    keep, call = torch.tensor([[1, 1, 1], [0, 1, 1]]), Call(experts.names, ("subject", "style", "subject"))
    for scale in (torch.tensor([1.0, 0.3, 2]), torch.tensor([1.0, 2, 0.3])):  # may change within a call
        with experts.using(keep, scale, weigher, call):
            for site in experts.sites.values():
                x, run = inputs_of(site.module), experts.run(site.component)
                output = type(site.module).forward(site.module, inputs_of(site.module))
                before = output.clone()
                expected = add_experts(site, x, output.clone(), run)
                found = graphs.add(site.callback, site.module, x, output)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
                asked = isinstance(weigher, NormRouter) and site.reads == "text"  # in Python, which adds in place
                assert asked or site.callback.factors is not None
                assert asked or torch.equal(output, before)  # the compiler writes in place where it may
                assert (site.callback.ruled is None) == (asked or not isinstance(weigher, NormRouter))
                assert (expected - before).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["module", "method", "forward"])
@torch.no_grad()
def test_a_block_is_compiled_in_any_way(tiny: dict[str, Any], how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything ran, so that nobody has seen whether the LoRAs' modules are reached; not before loading."""
    torch._dynamo.reset()
    unet = tiny["unet"]
    blocks = unet.mid_block.attentions[0].transformer_blocks
    block = blocks[0]
    loras = [make_lora(tiny, name, seed, rank=2, targets=(ATTENTION,)) for seed, name in enumerate(("cat", "boot"))]
    experts = Experts(loras)
    experts.attach(models(tiny))
    gates = gates_of(experts, GATES)
    with experts.using(weigher=gates):
        expected = unet(**unet_inputs()).sample
    experts.detach()
    experts.attach(models(tiny))
    try:
        if how == "module":
            blocks[0] = torch.compile(block, fullgraph=True, backend="eager")
        elif how == "method":
            block.compile(fullgraph=True, backend="eager")
        else:
            block.forward = torch.compile(block.forward, fullgraph=True, backend="eager")
        gates.bind(experts)
        with experts.using(weigher=gates):
            torch.testing.assert_close(unet(**unet_inputs()).sample, expected, atol=1e-5, rtol=1e-5)
            # Whether a graph has the modules that nobody saw run is asked once: it takes as long as much of a pass.
            monkeypatch.setattr("mole_diffusion.experts.attach._lies_in_a_graph", None)
            torch.testing.assert_close(unet(**unet_inputs()).sample, expected, atol=1e-5, rtol=1e-5)
        within = [site for site in experts.sites.values() if "mid_block.attentions.0.transformer" in site.name]
        assert all(site.callback and site.callback.ruled for site in within)
        scopes = {site.callback.ruled.scope for site in within if site.callback and site.callback.ruled}
        assert scopes == {"gate.attn1", "gate.attn2", "gate.attn2.text"}  # as in every block of this kind
        experts.detach()
        with pytest.raises(AttachError, match="is compiled"):
            experts.attach(models(tiny))
    finally:
        experts.detach()
        blocks[0] = block
        block._compiled_call_impl = None
        block.__dict__.pop("forward", None)
        torch._dynamo.reset()


def test_a_forward_that_is_kept_out_of_graphs_is_not_compiled() -> None:
    module = nn.Linear(2, 2)
    assert not is_compiled(module)
    module.forward = torch.compiler.disable(module.forward)
    assert not is_compiled(module)
    module.forward = torch.compile(module.forward, backend="eager")
    assert is_compiled(module)
    assert is_compiled(torch.compile(nn.Linear(2, 2), backend="eager"))


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
    site.move_to(site.module)  # for which factors are made anew, so none of before may stay
    assert callback.factors is None
    weight = site.module.weight.data
    for dtype, can_be in ((torch.bfloat16, True), (torch.float8_e4m3fn, False)):  # a graph cannot multiply by these
        site.module.weight.data = weight.to(dtype)
        with torch.no_grad():
            graphs.add(callback, site.module, x, base.clone())
        assert (callback.factors is not None) == can_be
    site.module.weight.data = weight
    tiny["unet"].to(torch.float32)
    experts.detach()
    assert callback.factors is None


GATES = GateConfig(input="hidden", token_axis="token", scope="layer", null_expert=True)


def gates_of(experts: Experts, config: GateConfig) -> MoLEModel:
    gates = MoLEModel.from_experts(experts, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in gates.gate_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    gates.bind(experts)
    return gates


def inputs_of_scope(spec: Any, experts: Experts) -> dict[str, torch.Tensor]:
    """What its modules are given, those that it reads the same."""
    inputs = {name: inputs_of(experts.sites[name].module) for name in spec.sites}
    return inputs | {name: inputs[spec.entry_sites[0]] for name in spec.entry_sites}


@pytest.mark.parametrize(
    "changed", [{}, {"null_expert": False, "gate_sum": 2.0}, {"normalization": "l2"}, {"scope": "matrix"}]
)
@torch.no_grad()
def test_gates_weigh_in_a_graph_as_they_do(experts: Experts, changed: dict[str, Any]) -> None:
    """Also where not all LoRAs touch a scope, and rows keep different ones."""
    gates = gates_of(experts, dataclasses.replace(GATES, **changed))
    some, scale = torch.tensor([[1, 1, 1], [0, 1, 1]]), torch.tensor([1.0, 0.3, 2.0])
    for chosen in ((some, scale), (torch.tensor([1, 0, 1]), torch.ones(3))):
        with experts.using(*chosen, gates):
            for spec in gates.specs:
                for name, x in inputs_of_scope(spec, experts).items():
                    site = experts.sites[name]
                    output = type(site.module).forward(site.module, inputs_of(site.module))
                    run = experts.run(site.component)
                    expected = add_experts(site, x, output.clone(), run)
                    found = graphs.add(site.callback, site.module, x, output)
                    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
                    assert site.callback.ruled is not None


def with_gates(experts: Experts, gates: MoLEModel, in_graph: bool) -> list[torch.Tensor]:
    """What the modules of an attention layer give."""
    spec = next(spec for spec in gates.specs if spec.name.endswith("mid_block.attentions.0.transformer_blocks.0.attn1"))
    given = []
    for site in (experts.sites[name] for name in spec.sites):
        x = torch.linspace(-1, 2, site.module.in_features).sin().expand(2, 5, -1).contiguous()
        output = torch.zeros(2, 5, site.module.out_features)
        if in_graph:
            given.append(graphs.add(site.callback, site.module, x, output))
        else:
            given.append(add_experts(site, x, output, experts.run(site.component)))
    return given


@torch.no_grad()
def test_a_graph_has_gates_that_lie_elsewhere_now(experts: Experts) -> None:
    """Gates that went to another device and came back lie in other memory, in which they may be trained on."""
    gates = gates_of(experts, GATES)
    with experts.using(weigher=gates):
        before = with_gates(experts, gates, in_graph=True)
    for parameter in gates.parameters():
        parameter.data = parameter.detach() * 0.5
    with experts.using(weigher=gates):
        found, expected = (with_gates(experts, gates, in_graph) for in_graph in (True, False))
    torch.testing.assert_close(found, expected)
    assert (found[0] - before[0]).abs().max() > 1e-3


@torch.no_grad()
def test_gates_that_are_recorded_are_asked(experts: Experts) -> None:
    """A graph that weighs itself tells nobody what they give."""
    gates = gates_of(experts, GATES)
    with gates.record() as record, experts.using(weigher=gates):
        found, expected = (with_gates(experts, gates, in_graph) for in_graph in (True, False))
    torch.testing.assert_close(found, expected)
    assert record.names
    with (
        experts.using(weigher=gates),
        gates.record(),
        pytest.raises(MoLEError, match="tells nobody what they give"),
    ):
        with_gates(experts, gates, in_graph=True)


@torch.no_grad()
def test_a_layer_that_runs_twice_reads_twice(experts: Experts, tiny: dict[str, Any]) -> None:
    torch._dynamo.reset()
    layer = tiny["unet"].mid_block.attentions[0].transformer_blocks[0].attn1
    x = torch.randn(2, 5, layer.to_q.in_features)
    twice = torch.compile(lambda x: layer(layer(x) + x), fullgraph=True, backend="aot_eager")
    with experts.using(weigher=gates_of(experts, GATES)):
        torch.testing.assert_close(twice(x), layer(layer(x) + x), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_a_gradient_of_gates_is_refused(experts: Experts) -> None:
    gates = gates_of(experts, GATES)
    with experts.using(weigher=gates), pytest.raises(MoLEError, match="gives no gradient, neither to gates"):
        with_gates(experts, gates, in_graph=True)


def test_a_graph_has_the_gates_whose_modules_it_has_all(experts: Experts) -> None:
    gates = gates_of(experts, GATES)
    parts = {name: name.rpartition(".")[0] for name in experts.sites}  # every parent of modules a part
    apart = {spec.name for spec in gates.specs if len({parts[site] for site in spec.sites}) > 1}
    assert 0 < len(apart) < gates.num_gates
    found = gates.rules({site: parts[name] for name, site in experts.sites.items()})
    assert set(found) == {site for spec in gates.specs if spec.name not in apart for site in spec.sites}
    some = next(spec for spec in gates.specs if len(spec.sites) > 1)
    without = {site: "" for name, site in experts.sites.items() if name != some.sites[-1]}
    assert not set(gates.rules(without)) & set(some.sites)


@torch.no_grad()
def test_a_choice_for_other_rows_than_the_batch_has_is_refused(experts: Experts) -> None:
    gates = gates_of(experts, GATES)
    with experts.using(torch.ones(3, 3), weigher=gates), pytest.raises(MoLEError, match="`keep` has 3 rows and"):
        with_gates(experts, gates, in_graph=True)


@torch.no_grad()
def test_a_module_that_runs_before_the_one_that_its_gate_reads_is_refused(experts: Experts) -> None:
    gates = gates_of(experts, GATES)
    site = next(site for name, site in experts.sites.items() if name.endswith("mid_block.attentions.0.proj_out"))
    output = type(site.module).forward(site.module, x := inputs_of(site.module))
    graphs._RUNNING.given.clear()
    with experts.using(weigher=gates), pytest.raises(MoLEError, match="in an order that the gates do not expect"):
        graphs.add(site.callback, site.module, x, output)


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


@pytest.mark.slow
@pytest.mark.parametrize(("case", "gated"), [(Flux.case, False), (ZImage.case, True)], ids=["flux", "z_image"])
def test_compiled_blocks_of_transformers_draw_the_same(case: Case, gated: bool) -> None:
    """Also where some modules are given the tokens of all samples one after another, which Python sets apart."""
    torch._dynamo.reset()
    pipe, other = case.pipe(), case.pipe()
    for one in (pipe, other):
        one.load_loras({name: lora_state(one, seed) for seed, name in enumerate(NAMES)})
        one.set_composition(COMPOSITIONS["mole"](gates_of(one.experts, GATES)) if gated else "budget")
    expected = draw(case, other)
    transformer = pipe.transformer  # of which nothing ran before
    transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert_same(draw(case, pipe), expected)
    blocks = tuple(name for name, module in transformer.named_modules() if module._compiled_call_impl is not None)
    for site in pipe.experts.sites.values():
        if site.module_name.startswith(blocks):
            assert site.callback is not None
            assert site.callback.factors is not None, site.name
            assert (site.callback.ruled is not None) == gated, site.name
    torch._dynamo.reset()


@pytest.mark.parametrize("first", ["linear", "norm_router"])
@torch.no_grad()
def test_a_graph_of_another_kind_is_refused_and_the_remedy_helps(experts: Experts, first: str) -> None:
    """A method that was set for all threads does not count while others draw with theirs."""
    site = next(site for name, site in experts.sites.items() if name.endswith("attn1.to_q"))
    x = inputs_of(site.module)
    base = nn.Linear.forward(site.module, x)
    drawing, over = threading.Event(), threading.Event()

    def draw() -> None:
        with experts.using(weigher=COMPOSITIONS[first]()):
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
