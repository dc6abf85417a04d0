"""Gates in a tiny Stable Diffusion: identities, masks, gradients, and what must not change them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from mole_diffusion.experts import Experts
from mole_diffusion.gating import GateConfig, MoLEModel, balance_loss
from mole_diffusion.gating.record import GateRecord
from mole_diffusion.lora import LoRA
from tests.merging import merge
from tests.running import EVERYTHING, in_float64, make_lora, models, run_text, run_unet, unet_inputs
from tests.tiny import ATTENTION, FEED_FORWARD, TEXT_ENCODER, tiny_components
from tests.weighing import Numbers

USUAL = (ATTENTION, FEED_FORWARD, TEXT_ENCODER)
CONFIGS: dict[str, dict[str, Any]] = {
    "matrix": {"scope": "matrix"},
    "layer": {"scope": "layer", "normalization": "layer_norm"},
    "block": {"scope": "block", "token_axis": 2},
    "network": {"scope": "network", "normalization": "l2"},
    "flatten": {"token_axis": "flatten"},
    "block experts": {"experts": "block"},
    "hidden": {"scope": "transformer", "input": "hidden", "token_axis": 2},
    "nothing": {"scope": "matrix", "input": "none"},
    "token": {"token_axis": "token"},
    "token hidden": {"scope": "layer", "input": "hidden", "token_axis": "token"},
}


@pytest.fixture(scope="module")
def loras() -> list[LoRA]:
    """Mixed ranks, everywhere the same modules."""
    components = tiny_components()
    return [make_lora(components, n, i, rank=2 * i + 2, targets=USUAL) for i, n in enumerate(("cat", "boot", "mug"))]


@pytest.fixture
def experts(components: dict[str, Any], loras: list[LoRA]) -> Experts:
    experts = Experts(loras)
    experts.attach(models(components))
    for component in ("unet", "text_encoder"):
        components[component].requires_grad_(False)
    return experts


def gates_for(experts: Experts, components: dict[str, Any], /, random: bool = True, **config: Any) -> MoLEModel:
    """Gates set as weigher; random ones are far from uniform."""
    if config.get("token_axis") == "flatten":
        experts.weigher = None
        with torch.no_grad():
            run_unet(components), run_text(components)
    gates = MoLEModel.from_experts(experts, GateConfig(**config))
    # A sum over all tokens is large: with larger weights a softmax has no gradient in float32.
    scale = 3.0 if config.get("normalization") == "l2" else 0.1 if config.get("token_axis") == "flatten" else 0.3
    for index, parameter in enumerate(gates.gate_parameters()):
        if random:
            generator = torch.Generator().manual_seed(index)
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    experts.weigher = gates
    return gates


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_one_lora_with_gate_one_is_that_lora(components: dict[str, Any], name: str) -> None:
    everything = EVERYTHING if name != "block experts" else USUAL
    lora = make_lora(components, "cat", 1, targets=everything)
    experts = Experts([lora])
    experts.attach(models(components))
    gates_for(experts, components, **CONFIGS[name])
    merged = tiny_components()
    merge(merged, lora)
    torch.testing.assert_close(run_unet(components), run_unet(merged), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run_text(components), run_text(merged), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "block experts"])
def test_untrained_gates_equal_the_normalised_sum(components: dict[str, Any], experts: Experts, name: str) -> None:
    gates_for(experts, components, random=False, **CONFIGS[name])
    unet, text = run_unet(components), run_text(components)
    experts.weigher = Numbers(torch.ones(3), renormalize=True)
    torch.testing.assert_close(unet, run_unet(components), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(text, run_text(components), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_record_is_of_its_own_thread_and_ends_in_any_order(components: dict[str, Any], experts: Experts) -> None:
    gates = gates_for(experts, components)

    first, second = gates.record(accumulate=True), gates.record(accumulate=True)
    outer, inner = first.__enter__(), second.__enter__()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(run_unet, components).result()
    assert outer.names == inner.names == ()
    first.__exit__(None, None, None)
    run_unet(components)
    second.__exit__(None, None, None)
    run_unet(components)
    assert outer.names == ()
    assert {len(passes) for passes in inner.by_pass.values()} == {1}

    def recorded() -> Iterator[GateRecord]:
        with gates.record(accumulate=True) as record:
            for _ in range(2):
                run_unet(components)
                yield record

    generators = [recorded(), recorded()]
    records = [next(generator) for generator in generators * 2]
    assert {len(passes) for record in records for passes in record.by_pass.values()} == {2}


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_masks_renormalise_and_nothing_kept_is_the_base(
    components: dict[str, Any], experts: Experts, name: str
) -> None:
    experts.weigher = None
    base = run_unet(components)
    gates = gates_for(experts, components, **CONFIGS[name])
    with gates.record() as record:
        free = run_unet(components)
    first = record.names[0]  # later gates see other hidden states under the mask
    with gates.record() as masked, experts.using(keep=torch.tensor([1, 0, 1])):
        run_unet(components)
    expected = record.tokens[first] * torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(masked.tokens[first], expected / expected.sum(-1, keepdim=True))
    torch.testing.assert_close(masked.gates[first], masked.tokens[first].mean(dim=1))
    assert masked.tokens[first].shape[1] == (256 if name.startswith("token") else 1)
    for values in masked.gates.values():
        torch.testing.assert_close(values.sum(dim=-1), torch.ones(2))
        assert values[:, 1].abs().max() == 0
    with experts.using(keep=torch.zeros(3)):
        assert torch.equal(run_unet(components), base)
    assert not torch.allclose(free, base, atol=1e-3)


@torch.no_grad()
def test_a_masked_lora_equals_its_absence(components: dict[str, Any], experts: Experts, loras: list[LoRA]) -> None:
    """With untrained gates, which do not look at the masked expert either."""
    in_float64(components)
    gates_for(experts, components, random=False)
    with experts.using(keep=torch.tensor([1, 0, 1])):
        masked = run_unet(components), run_text(components)
    experts.detach()
    two = Experts([loras[0], loras[2]])
    two.attach(models(components))
    gates_for(two, components, random=False)
    torch.testing.assert_close(masked[0], run_unet(components), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(masked[1], run_text(components), atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_an_absent_lora_takes_no_share(components: dict[str, Any]) -> None:
    experts = Experts([make_lora(components, "a", 1, targets=USUAL), make_lora(components, "b", 2, targets=ATTENTION)])
    experts.attach(models(components))
    gates = gates_for(experts, components, scope="layer")
    with gates.record() as record:
        run_unet(components), run_text(components)
    for name, present in zip(record.names, record.present(), strict=True):
        values = record.gates[name]
        if name.endswith(".ff") or name.startswith("text_encoder"):
            assert present.tolist() == [True, False]
            assert values.tolist() == [[1.0, 0.0]] * 2
        else:
            assert present.tolist() == [True, True]
            assert values.min() > 0
    with experts.using(keep=torch.tensor([0, 1])):
        text = run_text(components)  # only the absent one is kept: nothing to add
    experts.weigher = None
    assert torch.equal(text, run_text(components))


@torch.no_grad()
@pytest.mark.parametrize("name", ["block", "block experts"])
def test_rows_of_keep_and_scale_equal_separate_runs(components: dict[str, Any], experts: Experts, name: str) -> None:
    gates_for(experts, components, **CONFIGS[name])
    keep, scale = torch.tensor([[1, 1, 0], [0, 1, 1]]), torch.tensor([[1.0, 0.5, 1.0], [1.0, 1.0, 0.2]])
    with experts.using(keep=keep, scale=scale):
        together = run_unet(components)
    with experts.using(keep=keep):
        assert not torch.allclose(together, run_unet(components), atol=1e-3)  # scale acts
    inputs = unet_inputs()
    for row in range(2):
        alone = {k: v[row : row + 1] for k, v in inputs.items() if k != "timestep"}
        with experts.using(keep=keep[row], scale=scale[row]):
            torch.testing.assert_close(together[row], run_unet(components, **alone)[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_permuting_loras_and_gates_changes_nothing(
    components: dict[str, Any], experts: Experts, loras: list[LoRA], name: str
) -> None:
    gates = gates_for(experts, components, **CONFIGS[name])
    expected = run_unet(components), run_text(components)
    order = [2, 0, 1]
    experts.detach()
    permuted_experts = Experts([loras[i] for i in order])
    permuted_experts.attach(models(components))
    permuted = gates_for(permuted_experts, components, **CONFIGS[name])
    for key, gate in gates.gates.items():
        spec = next(spec for spec in gates.specs if spec.name == key.replace("/", "."))
        if spec.hidden_features is not None:
            widths = []
        elif spec.block is not None:
            widths = [[spec.entries[0].features] * 3]
        else:
            widths = [list(entry.ranks) for entry in spec.entries]
        starts = torch.tensor([0] + [w for entry in widths for w in entry]).cumsum(0)
        columns: list[int] = []
        for entry in range(len(widths)):
            for i in order:
                columns += range(int(starts[3 * entry + i]), int(starts[3 * entry + i + 1]))
        target: Any = permuted.gates[key]
        target.weight.data = gate.weight.data[order][..., columns or slice(None)]  # type: ignore[union-attr, index]
        target.log_temperature.data = gate.log_temperature.data
        if gate.weight_sum is not None:
            target.weight_sum.data = gate.weight_sum.data[order]  # type: ignore[union-attr, index]
    torch.testing.assert_close(run_unet(components), expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run_text(components), expected[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_every_gate_and_nothing_else(components: dict[str, Any], experts: Experts, name: str) -> None:
    gates = gates_for(experts, components, **CONFIGS[name])
    target = unet_inputs()["sample"].flip(0)
    with gates.record() as record:
        text = run_text(components)
        prediction = run_unet(components, encoder_hidden_states=text)
    loss = (prediction - target).square().mean() + 0.5 * balance_loss(record.places(), record.present())
    loss.backward()
    for key, parameter in gates.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key
    for component in ("unet", "text_encoder"):
        assert all(parameter.grad is None for parameter in components[component].parameters())


@pytest.mark.parametrize("name", ["layer", "network", "block experts", "hidden", "nothing"])
def test_checkpointing_and_training_mode_change_nothing(
    components: dict[str, Any], experts: Experts, name: str
) -> None:
    unet = components["unet"]
    gates = gates_for(experts, components, **CONFIGS[name])
    results: list[list[Tensor]] = []
    for mode in ("eval", "train", "checkpointed"):
        unet.train(mode != "eval")
        if mode == "checkpointed":
            unet.enable_gradient_checkpointing()
        gates.zero_grad()
        with gates.record(accumulate=True) as record, experts.using(scale=torch.tensor([1.0, 2.0, 1.0])):
            output = run_unet(components)
        loss = output.square().mean() + balance_loss(record.places())
        with gates.record(accumulate=True) as during_backward:
            loss.backward()  # recomputes outside `using`
        assert during_backward.names == ()
        assert all(len(passes) == 1 for passes in record.by_pass.values())
        gradients = [p.grad for p in gates.parameters() if p.grad is not None]
        assert len(gradients) > 0
        results.append([output.detach(), record.places().detach(), *gradients])
    for others in results[1:]:
        for first, other in zip(results[0], others, strict=True):
            torch.testing.assert_close(first, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["block", "network"])
def test_checkpointing_over_several_passes(components: dict[str, Any], experts: Experts, name: str) -> None:
    """A chain of denoising steps, each with other settings, and one backward pass after all of them."""
    unet = components["unet"].train()
    gates = gates_for(experts, components, **CONFIGS[name])
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            unet.enable_gradient_checkpointing()
        gates.zero_grad()
        sample = unet_inputs()["sample"]
        for timestep, keep in ((900, [1, 1, 0]), (100, [0, 1, 1])):
            with experts.using(keep=torch.tensor(keep)):
                sample = sample - 0.5 * run_unet(components, sample=sample, timestep=timestep)
        with torch.no_grad():
            run_unet(components)  # a preview in between
        sample.square().mean().backward()
        gradients.append([p.grad.clone() for n, p in gates.named_parameters() if "unet" in n and p.grad is not None])
    assert len(gradients[0]) > 1
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-7, rtol=1e-4)


@torch.no_grad()
def test_a_block_called_alone_is_weighed(components: dict[str, Any], experts: Experts) -> None:
    gates_for(experts, components)
    block = components["unet"].mid_block.attentions[0].transformer_blocks[0]
    x, prompt = torch.randn(2, 9, 64), unet_inputs()["encoder_hidden_states"]
    weighed = block(x, encoder_hidden_states=prompt)
    assert torch.equal(block(x, encoder_hidden_states=prompt), weighed)
    with experts.using(keep=torch.zeros(3)):
        base = block(x, encoder_hidden_states=prompt)
    assert not torch.allclose(base, weighed, atol=1e-3)


@torch.no_grad()
def test_other_resolutions(components: dict[str, Any], experts: Experts) -> None:
    inputs = unet_inputs(batch=1, size=24)
    inputs["sample"] = inputs["sample"][:, :, :11]  # 11 x 24: an odd side is halved rounding up
    for axis in ("pooled", 3, "token"):
        gates_for(experts, components, token_axis=axis)
        assert run_unet(components, **inputs).isfinite().all()
    gates_for(experts, components, token_axis="flatten")
    run_unet(components)
    with pytest.raises(ValueError, match=r"for 256 tokens, and now there are 264"):
        run_unet(components, **inputs)


@torch.no_grad()
def test_a_processor_set_afterwards_is_still_gated(components: dict[str, Any], experts: Experts) -> None:
    gates_for(experts, components)
    expected = run_unet(components)
    unet = components["unet"]
    unet.set_attn_processor({name: type(processor)() for name, processor in unet.attn_processors.items()})
    torch.testing.assert_close(run_unet(components), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_both_engines_give_the_same_gates(components: dict[str, Any], loras: list[LoRA]) -> None:
    outputs = []
    for engine in ("hooks", "processors"):
        experts = Experts(loras)
        experts.attach(models(components), engine)  # type: ignore[arg-type]
        gates_for(experts, components, scope="layer")
        outputs.append(run_unet(components))
        experts.detach()
    assert torch.equal(*outputs)


@torch.no_grad()
@pytest.mark.parametrize("name", ["block", "block experts"])
def test_detach_leaves_no_hook_and_attach_binds_again(components: dict[str, Any], experts: Experts, name: str) -> None:
    gates = gates_for(experts, components, **CONFIGS[name])
    expected = run_unet(components)
    experts.detach()
    modules = [module for model in models(components).values() for module in model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    base = run_unet(components)
    assert not torch.allclose(base, expected, atol=1e-3)
    experts.attach(models(components))
    assert experts.weigher is gates
    assert torch.equal(run_unet(components), expected)


@torch.no_grad()
def test_gates_stay_fp32_under_a_half_precision_model(components: dict[str, Any], experts: Experts) -> None:
    gates = gates_for(experts, components)
    with gates.record() as record:
        expected = run_unet(components)
    components["unet"].to(torch.bfloat16)
    gates.to(torch.bfloat16)
    assert {parameter.dtype for parameter in gates.parameters()} == {torch.float32}
    assert {buffer.dtype for buffer in gates.buffers()} == {torch.float32}
    with gates.record() as halved:
        output = components["unet"](**unet_inputs(dtype=torch.bfloat16)).sample
    assert output.dtype == torch.bfloat16
    assert halved.places().dtype == torch.float32
    assert (halved.places() - record.places()).abs().max() < 0.05
    assert (output.float() - expected).norm() / expected.norm() < 0.05
    with torch.autocast("cpu", torch.bfloat16), gates.record() as autocast:
        components["unet"].float()(**unet_inputs())
    assert autocast.places().dtype == torch.float32


@torch.no_grad()
def test_records_and_tables(components: dict[str, Any], experts: Experts) -> None:
    gates = gates_for(experts, components)
    with gates.record(accumulate=True) as record:
        for timestep in (900, 500, 100):
            run_unet(components, timestep=timestep)
    run_unet(components)  # outside: not recorded
    assert all(len(passes) == 3 for passes in record.by_pass.values())
    table = record.table()
    assert table.places[0] == "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    assert table.places == tuple(spec.name for spec in gates.specs if spec.component == "unet")
    assert table.loras == ("cat", "boot", "mug")
    name = table.places[2]
    expected = sum(passes.mean(dim=0) for passes in record.by_pass[name]) / 3
    torch.testing.assert_close(table.values[2], expected)
    torch.testing.assert_close(record.mean()[name], expected)
    with gates.record() as latest:
        run_unet(components, timestep=900)
        run_unet(components, timestep=100)
    assert all(len(passes) == 1 for passes in latest.by_pass.values())
    torch.testing.assert_close(latest.gates[name], record.by_pass[name][2])
    with gates.record() as empty:
        pass
    with pytest.raises(ValueError, match="No gate was recorded"):
        empty.table()


@torch.no_grad()
def test_gates_can_be_copied_while_in_use(components: dict[str, Any], experts: Experts) -> None:
    """As an average of weights over training does."""
    gates = gates_for(experts, components)
    expected = run_unet(components)
    copied = copy.deepcopy(gates)
    for parameter in gates.parameters():
        parameter.data.zero_()
    experts.weigher = copied
    assert torch.equal(run_unet(components), expected)


def test_gates_are_no_part_of_the_unet(components: dict[str, Any], experts: Experts) -> None:
    keys = list(tiny_components()["unet"].state_dict())
    gates = gates_for(experts, components)
    assert list(components["unet"].state_dict()) == keys
    assert gates.num_gates == len(gates.specs) == len(gates.gates) > 5
    assert sum(p.numel() for p in gates.gate_parameters()) < 5000
