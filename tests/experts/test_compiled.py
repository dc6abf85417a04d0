"""A compiled model draws what it draws without compiling, in one graph, whatever is chosen from call to call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from mole_diffusion.composition import COMPOSITIONS, Call, RegionMap
from mole_diffusion.composition.prompt import PromptWords
from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import Experts, compiled
from mole_diffusion.gating import GateConfig, MoLEModel
from mole_diffusion.lora import LoRA
from tests.running import make_lora, models, unet_inputs
from tests.tiny import tiny_components
from tests.weighing import Numbers

pytestmark = pytest.mark.slow
DEFAULT_GATES = GateConfig(input="hidden", token_axis="token", scope="layer", null_expert=True)


@pytest.fixture(scope="module")
def tiny() -> Iterator[dict[str, Any]]:
    torch._dynamo.reset()
    yield tiny_components()
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def loras(tiny: dict[str, Any]) -> list[LoRA]:
    return [make_lora(tiny, name, seed, rank=3) for seed, name in enumerate(("cat", "boot", "mug"))]


@pytest.fixture(scope="module")
def experts(tiny: dict[str, Any], loras: list[LoRA]) -> Iterator[Experts]:
    experts = Experts(loras)
    experts.attach(models(tiny))
    experts.weigher = Numbers(torch.ones(3))
    yield experts
    experts.detach()


@pytest.fixture(scope="module")
def run(tiny: dict[str, Any], experts: Experts) -> Any:
    """The whole UNet in one graph; made once, for it takes seconds."""
    graph = torch.compile(tiny["unet"], fullgraph=True, backend="eager")
    with torch.no_grad():
        graph(**unet_inputs())
    return graph


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def gates_of(experts: Experts, seed: int = 3) -> MoLEModel:
    gates = MoLEModel.from_experts(experts, DEFAULT_GATES)
    generator = torch.Generator().manual_seed(seed)
    for parameter in gates.gate_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    gates.bind(experts)
    return gates


@torch.no_grad()
def test_no_other_graph_for_any_choice_scale_step_prompt_and_method(
    tiny: dict[str, Any], experts: Experts, run: Any
) -> None:
    unet, inputs, before = tiny["unet"], unet_inputs(), graphs()
    poorer = Numbers(torch.tensor([0.2, 0.5, 0.3]))
    calls: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"keep": torch.tensor([1, 0, 1])}, {}),
        ({"keep": torch.tensor([0, 1, 0]), "scale": torch.tensor([1.0, 0.3, 1.0])}, {"timestep": torch.tensor(7)}),
        ({"keep": torch.zeros(3)}, {}),
        ({"weigher": poorer}, {"encoder_hidden_states": torch.randn(2, 16, 32)}),
        ({"keep": torch.tensor([[1, 1, 0], [0, 1, 1]]), "weigher": poorer}, {}),
    ]
    results = []
    for using, changed in calls:
        with experts.using(**using):
            expected = unet(**{**inputs, **changed}).sample
            results.append(run(**{**inputs, **changed}).sample)
        torch.testing.assert_close(results[-1], expected, atol=1e-5, rtol=1e-5)
    assert graphs() == before
    assert not counters["graph_break"]
    assert all((results[0] - other).abs().max() > 0.01 for other in results[1:])


@torch.no_grad()
def test_a_method_of_several_passes_is_refused(experts: Experts, run: Any) -> None:
    class Twice(Numbers):
        name = "twice"

        def passes(self, run: Any) -> int:
            return 2

    with experts.using(weigher=Twice(torch.ones(3))), pytest.raises(MoLEError, match="'twice' runs the denoiser 2 t"):
        run(**unet_inputs())


def test_what_would_get_no_gradient_is_refused(experts: Experts) -> None:
    """By the operator itself, as a graph calls it where gradients are wanted."""
    site = next(site for site in experts.sites.values() if site.module_name.endswith("attn1.to_q"))
    assert site.callback is not None
    x = torch.randn(2, 6, *site.stack.input_shape)
    output = torch.zeros(2, 6, site.stack.out_features)
    with experts.using(weigher=gates_of(experts)), pytest.raises(MoLEError, match="gives no gradient, neither to gate"):
        compiled.add(site.callback, x, output)
    with pytest.raises(MoLEError, match="nor to what it is given"):
        compiled.add(site.callback, x.requires_grad_(), output)
    assert not output.any()


@torch.no_grad()
def test_repeated_blocks_share_their_graphs(tiny: dict[str, Any], experts: Experts) -> None:
    unet, inputs = tiny["unet"], unet_inputs()
    expected = []
    choices = [torch.tensor([1, 1, 1]), torch.tensor([0, 1, 1]), torch.tensor([1, 0, 0])]
    for keep in choices:
        with experts.using(keep=keep):
            expected.append(unet(**inputs).sample)
    blocks = [module for module in unet.modules() if type(module).__name__ == "BasicTransformerBlock"]
    before = graphs()
    for block in blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    made = []
    try:
        for keep, result in zip(choices, expected, strict=True):
            with experts.using(keep=keep):
                torch.testing.assert_close(unet(**inputs).sample, result, atol=1e-5, rtol=1e-5)
            made.append(graphs() - before)
        # As many as there are widths of blocks, and none more for another choice.
        assert made == [len({block.norm1.normalized_shape for block in blocks})] * 3
        assert not counters["graph_break"]
    finally:
        for block in blocks:
            block._compiled_call_impl = None


@torch.no_grad()
def test_a_compiled_block_in_a_model_with_merged_weights_adds_beside_its_own(
    tiny: dict[str, Any], experts: Experts
) -> None:
    """Compiled after merging, or before; the LoRAs are there once, not twice and not never."""
    block, linear = tiny["unet"].mid_block.attentions[0].transformer_blocks[0], COMPOSITIONS["linear"]()
    with experts.using(weigher=linear):
        beside = tiny["unet"](**unet_inputs()).sample
        experts.merge()
        try:
            merged = tiny["unet"](**unet_inputs()).sample
            block.compile(backend="eager", fullgraph=True)
            after = tiny["unet"](**unet_inputs()).sample
            experts.unmerge()
            without = tiny["unet"](**unet_inputs()).sample
            experts.merge()
            before = tiny["unet"](**unet_inputs()).sample
        finally:
            block._compiled_call_impl = None
            experts.unmerge()
    with experts.using(keep=torch.zeros(3)):
        base = tiny["unet"](**unet_inputs()).sample
    assert (beside - base).abs().max() > 0.01
    for found in (merged, after, without, before):
        torch.testing.assert_close(found, beside, atol=1e-5 * float(beside.abs().max()), rtol=0)


@contextmanager
def regional_call(tiny: dict[str, Any], experts: Experts) -> Iterator[Call]:
    """A call of a pipeline in which each LoRA has a word of the prompt and a stripe of the picture."""
    owned = torch.zeros(1, 3, 16, dtype=torch.bool)
    owned[0, range(3), range(1, 4)] = True
    words = PromptWords(owned)
    words.encoded(unet_inputs()["encoder_hidden_states"][-1:])
    stripes = {name: (index / 3, 0, (index + 1) / 3, 1) for index, name in enumerate(experts.names)}
    regions = RegionMap.from_regions(stripes, experts.names, image_size=(16, 16), grid=(16, 16))
    schedule = SimpleNamespace(timesteps=torch.tensor([900, 500, 100]), order=1)
    yield Call(experts.names, ("subject",) * 3, schedule, words=words, regions=regions)


@pytest.mark.parametrize("whole", [True, False])
@torch.no_grad()
def test_what_weighs_by_place_is_asked_once_a_place_and_has_its_products_in_the_graph(
    tiny: dict[str, Any], experts: Experts, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    unet, inputs, asked = tiny["unet"], unet_inputs(), []
    linear, budget, masks = (COMPOSITIONS[name]() for name in ("linear", "budget", "masks"))
    calls: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"weigher": linear}, {}),
        ({"weigher": linear, "keep": torch.tensor([1, 0, 1])}, {}),
        ({"weigher": budget, "scale": torch.tensor([1.0, 0.3, 1.0])}, {"timestep": torch.tensor(100)}),
        ({"weigher": linear, "keep": torch.zeros(3)}, {"encoder_hidden_states": torch.randn(2, 16, 32)}),
        ({"weigher": linear, "keep": torch.tensor([[1, 1, 0], [0, 1, 1]])}, {}),
        ({"weigher": masks}, {}),
        ({"weigher": masks, "keep": torch.tensor([0, 1, 1])}, {"timestep": torch.tensor(100)}),
    ]
    expected = []
    for using, changed in calls:
        with regional_call(tiny, experts) as call, experts.using(call=call, **using):
            expected.append(unet(**{**inputs, **changed}).sample)
    sites = [site for site in experts.sites.values() if site.component == "unet"]
    places = {(site.reads, site.halvings, site.tokens, site.stack.is_convolution) for site in sites}
    torch._dynamo.reset()
    blocks = [module for module in unet.modules() if type(module).__name__ == "BasicTransformerBlock"]
    compiled_parts = [] if whole else blocks
    for part in compiled_parts:
        part.compile(fullgraph=True, backend="aot_eager")
    run = torch.compile(unet, fullgraph=True, backend="aot_eager") if whole else unet
    found = compiled.callback_of
    monkeypatch.setattr(compiled, "callback_of", lambda number: asked.append(number) or found(number))
    made, before = [], graphs()
    try:
        for (using, changed), result in zip(calls, expected, strict=True):
            asked.clear()
            with regional_call(tiny, experts) as call, experts.using(call=call, **using):
                torch.testing.assert_close(run(**{**inputs, **changed}).sample, result, atol=1e-5, rtol=1e-5)
            made.append(graphs() - before)
            if whole:  # where a pass begins and ends, and for weights
                attention = len([name for name, _ in unet.named_modules() if name.endswith(".attn2")])  # to the prompt
                assert len(asked) == 2 + (len(places) + attention if using["weigher"] is masks else 1)
    finally:
        for part in compiled_parts:
            part._compiled_call_impl = None
    assert made[:5] == made[:1] * 5
    assert made[5:] == made[5:6] * 2
    assert not counters["graph_break"]
    assert all((expected[0] - other).abs().max() > 0.01 for other in expected[1:])


@pytest.mark.parametrize("transformers", [True, False])
@torch.no_grad()
def test_gates_are_in_the_graph_and_other_gates_take_their_place(
    tiny: dict[str, Any], experts: Experts, monkeypatch: pytest.MonkeyPatch, transformers: bool
) -> None:
    """Of the transformer blocks, or of the middle with its convolutions."""
    unet, inputs, asked = tiny["unet"], unet_inputs(), []
    gates, others = gates_of(experts), COMPOSITIONS["mole"](gates_of(experts, 4))
    calls: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"weigher": gates}, {}),
        ({"weigher": gates, "keep": torch.tensor([1, 0, 1])}, {}),
        ({"weigher": gates, "scale": torch.tensor([1.0, 0.3, 2.0])}, {"timestep": torch.tensor(100)}),
        ({"weigher": others}, {"encoder_hidden_states": torch.randn(2, 16, 32)}),
        ({"weigher": others, "keep": torch.tensor([[1, 1, 0], [0, 1, 1]])}, {}),
        ({"weigher": gates, "keep": torch.zeros(3)}, {}),
    ]
    expected = []
    for using, changed in calls:
        with experts.using(**using):
            expected.append(unet(**{**inputs, **changed}).sample)
    torch._dynamo.reset()
    parts = [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    parts = parts if transformers else [unet.mid_block]
    for part in parts:
        part.compile(fullgraph=True, backend="aot_eager")
    found = compiled.callback_of
    monkeypatch.setattr(compiled, "callback_of", lambda number: asked.append(number) or found(number))
    made, before = [], graphs()
    try:
        for (using, changed), result in zip(calls, expected, strict=True):
            asked.clear()
            with experts.using(**using):
                given = unet(**{**inputs, **changed}).sample
            torch.testing.assert_close(given, result, atol=1e-4, rtol=1e-4)
            made.append(graphs() - before)
            assert len(asked) == len(parts)  # for what is chosen
    finally:
        for part in parts:
            part._compiled_call_impl = None
    assert made == made[:1] * len(calls)
    assert not transformers or made[0] == len({block.norm1.normalized_shape for block in parts})
    assert not counters["graph_break"]
    assert all((expected[0] - other).abs().max() > 0.01 for other in expected[1:])


@torch.no_grad()
def test_a_graph_outlives_its_loras_as_the_bare_base(tiny: dict[str, Any], experts: Experts, run: Any) -> None:
    unet, inputs = tiny["unet"], unet_inputs()
    with_loras = run(**inputs).sample
    experts.detach()
    base = run(**inputs).sample
    torch.testing.assert_close(base, unet(**inputs).sample, atol=1e-6, rtol=1e-6)
    assert (with_loras - base).abs().max() > 0.01
