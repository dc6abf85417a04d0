"""What a gate reads besides expert outputs, and shares that do not add up to one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mole_diffusion.experts import Experts
from mole_diffusion.gating import Gate, GateConfig, MoLEModel, masked_softmax
from mole_diffusion.gating.gate import divisors
from mole_diffusion.lora import LoRA
from mole_diffusion.speed import Counted
from tests import reference
from tests.gating.test_model import gates_for
from tests.running import EVERYTHING, make_lora, models, run_text, run_unet, unet_inputs
from tests.tiny import ATTENTION, FEED_FORWARD, TEXT_ENCODER, tiny_components
from tests.weighing import Numbers

PLACE = "unet.down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.fixture(scope="module")
def loras() -> list[LoRA]:
    """The last leaves feed-forward layers and the text encoder alone."""
    components = tiny_components()
    reach = ((ATTENTION, FEED_FORWARD, TEXT_ENCODER), (ATTENTION, FEED_FORWARD, TEXT_ENCODER), (ATTENTION,))
    return [make_lora(components, name, i, targets=reach[i]) for i, name in enumerate(("cat", "dog", "mug"))]


@pytest.fixture
def experts(components: dict[str, Any], loras: list[LoRA]) -> Experts:
    experts = Experts(loras)
    experts.attach(models(components))
    return experts


@torch.no_grad()
@pytest.mark.parametrize("token_axis", ["flatten", "pooled", 2])
@pytest.mark.parametrize("normalization", ["l2", "layer_norm"])
def test_a_gate_on_hidden_states_equals_the_equations(
    components: dict[str, Any], experts: Experts, token_axis: Any, normalization: str
) -> None:
    """Eqs. 9-11 with the hidden state in the place of the concatenated expert outputs."""
    gates = gates_for(experts, components, input="hidden", token_axis=token_axis, normalization=normalization)
    gate: Any = gates.gates[PLACE.replace(".", "/")]
    if gate.weight_sum is not None:  # what centring needs to know of e
        gate.weight_sum.copy_(gate.weight.sum(dim=(1, 2)))
    seen: list[Tensor] = []
    entry = components["unet"].get_submodule(f"{PLACE.removeprefix('unet.')}.attn1")
    entry.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    with gates.record() as record:
        run_unet(components)
    assert seen[0].shape == (2, 256, 32)
    e = gate.weight.double().flatten(1).T
    for row in range(2):
        expected = reference.literal_gate(
            [seen[0][row].double()], e, normalization, float(gate.temperature), token_axis, (16, 16)
        )
        torch.testing.assert_close(record.gates[PLACE][row], torch.tensor(expected), atol=1e-5, rtol=1e-4)
    assert record.gates[PLACE].std(dim=-1).min() > 0.01


@torch.no_grad()
def test_a_gate_on_hidden_states_reads_convolutions_too(components: dict[str, Any]) -> None:
    """Also where a stride makes the output smaller than the input."""
    experts = Experts([make_lora(components, name, i, targets=EVERYTHING) for i, name in enumerate(("a", "b"))])
    experts.attach(models(components))
    for token_axis in ("flatten", 2, "pooled", "token"):
        gates = gates_for(experts, components, input="hidden", token_axis=token_axis)
        with gates.record() as record:
            assert run_unet(components).isfinite().all()
        place = "unet.down_blocks.0.downsamplers.0"
        spec = next(spec for spec in gates.specs if spec.name == place)
        assert spec.positions == {"flatten": 256, 2: 4, "pooled": 1, "token": 1}[token_axis]
        assert record.gates[place].shape == (2, 2)


@torch.no_grad()
def test_a_gate_that_reads_nothing_is_one_number_per_lora(components: dict[str, Any], experts: Experts) -> None:
    gates = gates_for(experts, components, input="none", scope="matrix", normalization="layer_norm")
    with gates.record() as record:
        run_unet(components), run_text(components)
    for spec in gates.specs:
        gate: Any = gates.gates[spec.name.replace(".", "/")]
        assert gate.weight.shape == (len(spec.indices), 1, 1)
        expected = torch.zeros(3)
        expected[list(spec.indices)] = torch.softmax(gate.weight[:, 0, 0] / gate.temperature, dim=0)
        for row in record.gates[spec.name]:
            torch.testing.assert_close(row, expected)
    inputs = unet_inputs(size=24)
    with gates.record() as elsewhere:
        run_unet(components, **{**inputs, "sample": 3 * inputs["sample"]})
    assert all(torch.equal(elsewhere.gates[name], record.gates[name]) for name in elsewhere.names)


def masked(values: Sequence[float], mask: Sequence[int], null: float) -> list[float]:
    """Softmax over the kept logits and the null expert's, whose share is left out."""
    kept = [v for v, m in zip(values, mask, strict=True) if m]
    shares = iter(reference.softmax([*kept, null]))
    return [next(shares) if m else 0.0 for m in mask]


@torch.no_grad()
@pytest.mark.parametrize("mask", [(1, 1, 1), (1, 0, 1), (0, 1, 0)])
def test_a_null_expert_takes_its_share(components: dict[str, Any], experts: Experts, mask: tuple[int, ...]) -> None:
    gates = gates_for(experts, components, input="none", null_expert=True)
    gate: Any = gates.gates[PLACE.replace(".", "/")]
    assert gate.weight.shape == (4, 1, 1)
    *logits, null = (gate.weight[:, 0, 0] / gate.temperature).tolist()
    with gates.record() as record, experts.using(keep=torch.tensor(mask)):
        run_unet(components)
    torch.testing.assert_close(record.gates[PLACE][0], torch.tensor(masked(logits, mask, null)))
    assert record.gates[PLACE][0].sum() < 0.95


@torch.no_grad()
@pytest.mark.parametrize("mask", [(1, 1, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize("input", ["experts", "hidden", "none"])
def test_equal_gates_that_sum_to_n_are_the_plain_sum(
    components: dict[str, Any], experts: Experts, mask: tuple[int, ...], input: str
) -> None:
    """Under every mask, and where a LoRA touches only some of the modules."""
    gates_for(experts, components, random=False, gate_sum=3.0, input=input)
    with experts.using(keep=torch.tensor(mask)):
        ours = run_unet(components), run_text(components)
        experts.weigher = Numbers(torch.ones(3))
        torch.testing.assert_close(ours[0], run_unet(components), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours[1], run_text(components), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_sum_of_gates(components: dict[str, Any], experts: Experts) -> None:
    gates = gates_for(experts, components, gate_sum=2.0)
    for mask, total in (((1, 1, 1), 2.0), ((1, 0, 1), 2.0 ** (0.6309297535714574)), ((0, 1, 0), 1.0), ((0, 0, 0), 0.0)):
        with gates.record() as record, experts.using(keep=torch.tensor([mask, (1, 1, 1)])):
            run_unet(components)  # a second row, so that the pass is not left out where nothing is kept
        torch.testing.assert_close(record.gates[PLACE][0].sum(), torch.tensor(total))
        torch.testing.assert_close(record.gates[PLACE][1].sum(), torch.tensor(2.0))


def test_gates_saved_before_these_settings_mean_the_same(
    components: dict[str, Any], experts: Experts, tmp_path: Path
) -> None:
    gates = gates_for(experts, components)
    gates.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = run_unet(components)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("input", "gate_sum", "null_expert"):
        del config["gate_config"][key]
    for spec in config["gate_table"]:
        del spec["hidden_features"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = MoLEModel.from_pretrained(tmp_path)
    assert loaded.gate_config == GateConfig()
    experts.weigher = loaded
    with torch.no_grad():
        assert torch.equal(run_unet(components), expected)


@torch.no_grad()
def test_records_by_row(components: dict[str, Any], experts: Experts) -> None:
    gates = gates_for(experts, components)
    with gates.record() as record:
        run_unet(components), run_text(components)
    rows = record.rows()
    assert rows.shape == (2, len(record.names), 3)
    torch.testing.assert_close(rows.mean(dim=0), record.places())
    torch.testing.assert_close(rows[1, record.names.index(PLACE)], record.gates[PLACE][1])
    with gates.record() as record:
        run_unet(components), components["text_encoder"](torch.tensor([[3, 5, 8]]))
    with pytest.raises(ValueError, match=r"the sizes \[1, 2\]"):
        record.rows()


@pytest.mark.parametrize("normalization", ["rms", "l2", "layer_norm"])
def test_pixels_are_read_as_they_lie(normalization: Any) -> None:
    """A convolution's input, channels first, has the logits of the same tokens in order, and the same gradients."""
    generator = torch.Generator().manual_seed(0)
    gate = Gate(3, 1, 8, 24, normalization, temperature=0.7, beside=2).double()
    gate.weight.data.copy_(torch.randn(gate.weight.shape, generator=generator))
    channels_first = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)
    beside = torch.rand(2, 5, 2, generator=generator, dtype=torch.float64)
    found = []
    for features in (channels_first.transpose(1, 2), channels_first.transpose(1, 2).contiguous()):
        logits = gate.at_every_token(features, beside)
        (gradient,) = torch.autograd.grad(logits.square().sum(), gate.weight)
        found.append((logits, gradient))
    assert found[0][0].shape == (2, 5, 3)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("null_expert", [False, True])
@pytest.mark.parametrize("normalization", ["rms", "l2"])
@torch.no_grad()
def test_gates_without_a_gradient_are_the_same_in_fewer_operators(normalization: Any, null_expert: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    gates = [Gate(3, 1, 8, features, normalization, temperature) for features, temperature in ((24, 0.7), (48, 1.3))]
    channels_first = torch.randn(2, 8, 5, generator=generator)
    channels_first[0, :, 3] = 0  # a token of which nothing is to be read
    for gate, of_gate in zip(gates, divisors(gates, torch.device("cpu")), strict=True):
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator))
        for features in (channels_first.transpose(1, 2), channels_first.transpose(1, 2).contiguous()):
            with Counted() as plain:
                asked = masked_softmax(gate.at_every_token(features), None, null_expert)
            with Counted() as lean:
                shares = gate.shares_at_every_token(features, gate.weight, of_gate, null_expert)
            torch.testing.assert_close(shares, asked, rtol=1e-5, atol=1e-6)
            assert lean.operators < 0.75 * plain.operators
    assert not torch.allclose(shares[0, 0], shares[0, 1])


@pytest.mark.parametrize("keep", [(1, 1, 1), (1, 0, 1), (0, 1, 0)])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_model_with_gates_gives_the_same_with_and_without_a_gradient(
    components: dict[str, Any], experts: Experts, scale: float, keep: tuple[int, ...]
) -> None:
    gates_for(experts, components, input="hidden", token_axis="token", scope="layer", null_expert=True)
    with experts.using(keep=torch.tensor(keep), scale=torch.tensor([1.0, scale, 1.0])):
        with_gradient = run_unet(components)
        assert with_gradient.requires_grad
        with torch.no_grad():
            without, again = run_unet(components), run_unet(components)
    torch.testing.assert_close(without, with_gradient.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(without, again)


@pytest.mark.parametrize("scope", ["layer", "matrix"])
@torch.no_grad()
def test_what_q_k_and_v_read_is_weighed_at_once_where_they_share_a_gate(
    components: dict[str, Any], experts: Experts, monkeypatch: pytest.MonkeyPatch, scope: Any
) -> None:
    gates = gates_for(experts, components, input="hidden", token_axis="token", scope=scope)
    drawn, operators = [], []
    for _ in range(2):
        drawn.append(run_unet(components))
        with Counted() as counted:
            run_unet(components)
        operators.append(counted.operators)
        monkeypatch.setattr(MoLEModel, "of_groups", ())
    monkeypatch.undo()
    several = {name for name, site in experts.sites.items() if site.group.several}
    assert gates.of_groups == (several if scope == "layer" else set())
    assert (operators[0] < operators[1]) is (scope == "layer")
    torch.testing.assert_close(*drawn, atol=1e-6, rtol=1e-5)
