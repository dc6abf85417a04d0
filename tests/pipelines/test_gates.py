"""Gates in a pipeline: made, saved, loaded, checked, masked, and left when a plain method is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mole_diffusion.gating import GateConfig
from tests.composing import NAMES, PROMPT, assert_close, composing_pipeline, draw, lora_states
from tests.tiny import ATTENTION, random_lora


def wake(pipe: Any, seed: int = 0) -> None:
    """Random gates, for fresh ones are uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pipe.gates.gate_parameters():
            parameter += torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def pipe() -> Any:
    pipe = composing_pipeline(*NAMES)
    pipe.init_gates()
    wake(pipe)
    return pipe


def test_fresh_gates_draw_the_normalised_sum() -> None:
    # "Equal gates equal NLA" where every LoRA touches every place, so equal targets here.
    pipe = composing_pipeline()
    pipe.load_loras({name: random_lora({"unet": pipe.unet}, 4, ATTENTION, seed=k) for k, name in enumerate(NAMES)})
    pipe.set_composition("normalized")
    normalised = draw(pipe)
    gates = pipe.init_gates(GateConfig(scope="layer"))
    assert pipe.composition.name == "mole"
    assert pipe.gates is gates
    assert gates.gate_config.scope == "layer"
    assert_close(draw(pipe), normalised)


def test_trained_gates_draw_something_of_their_own(pipe: Any) -> None:
    drawn = draw(pipe)
    pipe.set_composition("normalized")
    assert not torch.allclose(draw(pipe), drawn, atol=0.05)
    pipe.set_composition("mole")
    assert torch.equal(draw(pipe), drawn)


def test_gates_save_and_load(pipe: Any, tmp_path: Path) -> None:
    expected = draw(pipe)
    assert pipe.save_gates(tmp_path / "gates") == tmp_path / "gates"
    fresh = composing_pipeline(*NAMES)
    assert fresh.load_gates(tmp_path / "gates") is fresh.gates
    assert fresh.composition.name == "mole"
    assert torch.equal(draw(fresh), expected)


def test_masks_under_gates(pipe: Any) -> None:
    assert torch.equal(draw(pipe, loras=[]), draw(composing_pipeline()))
    # A LoRA left alone has gate 1 wherever it is, which is that LoRA exactly.
    assert_close(draw(pipe, loras=["mug"]), draw(composing_pipeline("mug")))
    with pipe.gates.record() as record:
        draw(pipe, loras=["cat", "dog"])
    table = record.table()
    assert (table.values[:, 2] == 0).all()
    assert_close(table.values.sum(dim=1), torch.ones(len(table.places)))


def test_scales_under_gates(pipe: Any) -> None:
    assert_close(draw(pipe, loras={"mug": 0.5}), draw(composing_pipeline("mug"), cross_attention_kwargs={"scale": 0.5}))


def test_text_encoders_have_gates_too(pipe: Any) -> None:
    with pipe.gates.record() as record, pipe.composing():
        pipe.encode_prompt(PROMPT, "cpu", 1, False)
    assert record.names
    assert all(name.startswith("text_encoder.") for name in record.names)


def test_gates_learn_through_composing(pipe: Any) -> None:
    with pipe.composing(["cat", "dog"]):
        text, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
        pipe.unet(torch.randn(1, 4, 16, 16), 10, text).sample.square().mean().backward()
    gradients = [p.grad for p in pipe.gates.gate_parameters()]
    assert gradients
    assert sum(bool(g is not None and g.any()) for g in gradients) > len(gradients) / 2


def test_gates_stay_fp32_when_the_pipeline_is_cast(pipe: Any) -> None:
    pipe.to(dtype=torch.bfloat16)
    assert draw(pipe).dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in pipe.gates.parameters())


def test_gates_come_along_with_from_pipe(pipe: Any) -> None:
    other = type(pipe).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other.gates is pipe.gates
    assert torch.equal(draw(other), draw(pipe))


def test_unloading_gates_goes_back_to_the_default(pipe: Any) -> None:
    pipe.unload_gates()
    assert pipe.gates is None
    assert torch.equal(draw(pipe), draw(composing_pipeline(*NAMES)))


def test_unloading_all_loras_takes_the_gates_along(pipe: Any) -> None:
    pipe.unload_loras()
    assert pipe.gates is None
    assert torch.equal(draw(pipe), draw(composing_pipeline()))
    pipe.load_loras({"cat": lora_states(pipe)["cat"]})
    assert pipe.composition.name == "budget"


def test_the_loras_of_loaded_gates_stay(pipe: Any) -> None:
    message = r"gates for cat, dog, mug are loaded.*Mask LoRAs with .*unload_gates\(\)"
    with pytest.raises(ValueError, match=message):
        pipe.load_loras({"fox": lora_states(pipe)["cat"]})
    with pytest.raises(ValueError, match=message):
        pipe.unload_loras(["cat"])
    assert pipe.experts.names == NAMES


def _others(pipe: Any, case: str) -> dict[str, Any]:
    states = lora_states(pipe)
    return {
        "order": {name: states[name] for name in ("dog", "cat", "mug")},
        "names": {"cat": states["cat"], "dog": states["dog"], "cup": states["mug"]},
        "number": {"cat": states["cat"], "dog": states["dog"]},
        "ranks": {**states, "mug": random_lora({"unet": pipe.unet}, 3, seed=3)},
        "files": {**states, "mug": {key: -value for key, value in states["mug"].items()}},
    }[case]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("order", r"trained for the LoRAs \['cat', 'dog', 'mug'\] in this order, got \['dog', 'cat', 'mug'\]"),
        ("names", r"trained for the LoRAs \['cat', 'dog', 'mug'\], got \['cat', 'dog', 'cup'\]"),
        ("number", r"trained for the LoRAs \['cat', 'dog', 'mug'\], got \['cat', 'dog'\]"),
        ("ranks", r"'mug' has ranks \[3, 3\] and not \[2, 2\]"),
        ("files", "'mug' has factors of SHA-256 .* and not .*Load the ones they were trained with"),
    ],
)
def test_gates_for_other_loras_are_refused(pipe: Any, tmp_path: Path, case: str, message: str) -> None:
    pipe.save_gates(tmp_path)
    other = composing_pipeline()
    other.load_loras(_others(other, case))
    before = draw(other)
    with pytest.raises(ValueError, match=message):
        other.load_gates(tmp_path)
    assert other.gates is None
    assert other.composition.name == "budget"
    assert torch.equal(draw(other), before)


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no gates to save"):
        composing_pipeline(*NAMES).save_gates(tmp_path)
