"""Gates that correct masks: untrained they are the rule, and trained they read hidden state and mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mole_diffusion.composition import Budget, FreeFuse, Linear, MaskedGates, Masks, MoLE
from mole_diffusion.gating import GateConfig
from tests import reference
from tests.composing import NAMES, assert_close, composing_pipeline, draw

PROMPT = "a photo of a cat, a dog and a mug"
KIND = GateConfig(input="hidden", token_axis="token", scope="layer", residual=True)


def four(pipe: Any, **kwargs: Any) -> Tensor:
    return draw(pipe, PROMPT, **{"num_inference_steps": 4, **kwargs})


def wake(gates: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gates.gate_parameters():
            parameter += torch.randn(parameter.shape, generator=generator) / 10


@pytest.fixture(scope="module")
def pipe() -> Any:
    """With gates that say something."""
    pipe = composing_pipeline(*NAMES)
    wake(pipe.init_gates(KIND))
    return pipe


@pytest.mark.parametrize("method", [Masks(), Masks(online=True), FreeFuse()])
def test_untrained_they_are_the_rule_bit_for_bit(method: Any) -> None:
    pipe = composing_pipeline(*NAMES)
    scaled = {"cat": 0.5, "dog": 1.0, "mug": -0.3}
    pipe.set_composition(method)
    rule = four(pipe, loras=scaled)
    gates = pipe.init_gates(KIND)
    assert pipe.composition.name == "masked_gates"
    pipe.set_composition(MaskedGates(method))
    assert torch.equal(four(pipe, loras=scaled), rule)
    wake(gates)
    assert not torch.allclose(four(pipe, loras=scaled), rule, atol=0.05)


def test_masks_off_one_lora_and_no_state(pipe: Any) -> None:
    first = four(pipe)
    alone = composing_pipeline("cat")
    assert torch.equal(four(pipe, loras=[]), four(alone, loras=[]))
    alone.set_composition("linear")
    assert_close(four(pipe, loras={"cat": 0.7}), four(alone, loras={"cat": 0.7}))
    assert torch.equal(four(pipe), first)


def test_a_lora_masked_out_has_no_weight_anywhere(pipe: Any) -> None:
    with pipe.gates.record(accumulate=True) as record:
        four(pipe, loras=["cat", "dog"])
    assert record.names
    for passes in record.by_pass.values():
        for weights in passes:
            assert not weights[:, 2].any()
            assert weights[:, :2].any()


@torch.no_grad()
def test_a_gate_reads_the_hidden_state_and_the_masks(pipe: Any) -> None:
    regions = {"cat": (0, 0, 0.5, 0.5), "dog": (0.5, 0, 1, 0.5), "mug": (0, 0.5, 1, 1)}
    place = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    read: list[Tensor] = []
    layer = pipe.unet.get_submodule(place.removeprefix("unet."))
    handle = layer.to_q.register_forward_hook(lambda module, args, output: read.append(args[0]))
    with pipe.gates.record() as record:
        four(pipe, regions=regions)
    handle.remove()
    gate: Any = pipe.gates.gates[place.replace(".", "/")]
    hidden, found = read[-1].double(), record.tokens[place]
    side = int(hidden.shape[1] ** 0.5)
    masks = pipe.masks.at(side, side)[0].double()
    e, c = gate.weight[:, 0, :-3].double(), gate.weight[:, 0, -3:].double()
    for row in range(2):
        for token in range(0, side * side, 7):
            expected = reference.corrected_mask(
                masks[token].tolist(), hidden[row, token].tolist(), e, c, float(gate.temperature)
            )
            assert found[row, token].tolist() == pytest.approx(expected, abs=1e-5)


def test_gradients_reach_hidden_state_and_mask(pipe: Any) -> None:
    pipe.gates.zero_grad()
    with pipe.composing(), pipe.gates.record() as record:
        pipe.encode_prompt(PROMPT, "cpu", 1, False)
        record.places().square().sum().backward()
    touched = [parameter.grad for name, parameter in pipe.gates.named_parameters() if parameter.grad is not None]
    assert touched
    for gradient in touched:
        if gradient.ndim == 3:  # not of a temperature
            assert gradient[..., :-3].any()
            assert gradient[..., -gradient.shape[0] :].any()
    pipe.gates.zero_grad()


def test_they_save_and_load(pipe: Any, tmp_path: Path) -> None:
    expected = four(pipe)
    pipe.save_gates(tmp_path)
    other = composing_pipeline(*NAMES)
    gates = other.load_gates(tmp_path)
    assert gates.gate_config == KIND
    assert other.composition.name == "masked_gates"
    assert torch.equal(four(other), expected)


def test_gates_and_methods_of_other_kinds_are_refused(pipe: Any) -> None:
    composition = pipe.composition
    with pytest.raises(ValueError, match=r"were trained to correct masks.*set_composition\(\"masked_gates\"\)"):
        pipe.set_composition("mole")
    assert pipe.composition is composition
    plain = composing_pipeline(*NAMES)
    plain.init_gates()
    with pytest.raises(ValueError, match=r"correct no masks.*set_composition\(\"mole\"\).*residual=True"):
        plain.set_composition("masked_gates")
    assert isinstance(plain.composition, MoLE)
    with pytest.raises(ValueError, match=r"'linear' gives LoRAs no masks.*MaskedGates\(Masks\(\)\)"):
        MaskedGates(Linear())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'masked_gates' needs gates, and none are loaded"):
        composing_pipeline(*NAMES).set_composition("masked_gates")
    with pytest.raises(ValueError, match=r"lacks the words that call a LoRA: 'mug'"):
        draw(pipe, "a cat and a dog")
    with pytest.raises(ValueError, match=r"were trained to correct masks"):
        pipe.gates.weigh(*[None] * 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": "experts"}, "residual=True needs input='hidden', got input='experts'"),
        ({"token_axis": "pooled"}, "residual=True needs token_axis='token', got token_axis='pooled'"),
        ({"null_expert": True}, "residual=True needs null_expert=False, got null_expert=True"),
        ({"gate_sum": 3.0}, "residual=True needs gate_sum=1.0, got gate_sum=3.0"),
        ({"residual": "yes"}, "`residual` must be true or false"),
    ],
)
def test_settings_that_contradict_it(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateConfig(**{**KIND.to_dict(), **settings})


def test_a_budget_may_stand_around_gates(pipe: Any) -> None:
    plain = composing_pipeline(*NAMES)
    gates = plain.init_gates()
    plain.set_composition(Budget(MoLE()))
    assert plain.composition.method.gates is gates
    assert not torch.equal(four(plain), four(pipe))
