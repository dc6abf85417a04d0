"""LoRAs and gates come and go: what is taken, what is refused, and that nothing of it stays behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mole_diffusion.composition import Budget, Normalized
from mole_diffusion.lora import LoRAError, load_lora, save_lora
from tests.composing import NAMES, composing_pipeline, draw, lora_states


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def pipe() -> Any:
    return composing_pipeline()


@pytest.fixture
def files(pipe: Any, tmp_path: Path) -> dict[str, Path]:
    components = pipe.lora_components
    return {
        name: save_lora(load_lora(state, components, name=name), tmp_path / f"{name}.safetensors")
        for name, state in lora_states(pipe).items()
    }


def test_components_that_loras_can_touch(pipe: Any) -> None:
    assert pipe.lora_components == {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


def test_files_state_dicts_and_loras_are_the_same(pipe: Any, files: dict[str, Path]) -> None:
    expected = draw(composing_pipeline(*NAMES))
    read = load_lora(files["mug"], pipe.lora_components, name="some other name")
    pipe.load_loras({"cat": str(files["cat"]), "dog": lora_states(pipe)["dog"], "mug": read})
    assert pipe.experts.names == NAMES
    assert torch.equal(draw(pipe), expected)


def test_a_list_of_files_is_named_by_their_stems(pipe: Any, files: dict[str, Path]) -> None:
    pipe.load_loras(list(files.values()))
    assert pipe.experts.names == NAMES


def test_loras_can_be_added_and_taken_one_by_one(pipe: Any) -> None:
    states = lora_states(pipe)
    for name in NAMES:
        pipe.load_loras({name: states[name]})
    assert torch.equal(draw(pipe), draw(composing_pipeline(*NAMES)))
    pipe.unload_loras(["cat"])
    assert pipe.experts.names == ("dog", "mug")
    assert torch.equal(draw(pipe), draw(composing_pipeline("dog", "mug")))


@pytest.mark.parametrize("names", [None, ["mug", "cat", "dog"]])
def test_without_loras_the_model_is_as_before(pipe: Any, names: list[str] | None) -> None:
    base, processors = draw(pipe), pipe.unet.attn_processors
    before = hooks(pipe.unet), hooks(pipe.text_encoder)
    pipe.load_loras(lora_states(pipe))
    assert hooks(pipe.unet) > before[0]
    pipe.unload_loras(names)
    assert (hooks(pipe.unet), hooks(pipe.text_encoder)) == before
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in processors.items())
    assert pipe.experts is None
    assert torch.equal(draw(pipe), base)
    pipe.unload_loras()  # nothing to do


def test_the_default_method_keeps_the_budget_and_a_choice_stays(pipe: Any) -> None:
    assert isinstance(pipe.composition, Budget)
    pipe.load_loras({"cat": lora_states(pipe)["cat"]})
    assert pipe.composition.name == "budget"
    pipe.set_composition("linear")
    pipe.load_loras({"dog": lora_states(pipe)["dog"]})
    assert pipe.composition.name == "linear"


def test_a_refused_load_changes_nothing(pipe: Any, tmp_path: Path) -> None:
    states = lora_states(pipe)
    pipe.load_loras({"cat": states["cat"]})
    before = draw(pipe)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"\x10")
    with pytest.raises(LoRAError, match=r"torn\.safetensors"):
        pipe.load_loras({"dog": states["dog"], "torn": torn})
    assert pipe.experts.names == ("cat",)
    assert torch.equal(draw(pipe), before)


def test_a_model_that_cannot_take_experts_keeps_the_former_ones(pipe: Any) -> None:
    states = lora_states(pipe)
    pipe.load_loras({"mug": states["mug"]})
    before = draw(pipe)
    pipe.text_encoder.compile(backend="eager")  # refused, for its graph would not see the hooks
    with pytest.raises(ValueError, match="text_encoder is compiled"):
        pipe.load_loras({"cat": states["cat"]})
    assert pipe.experts.names == ("mug",)
    pipe.text_encoder._compiled_call_impl = None
    assert torch.equal(draw(pipe), before)


@pytest.mark.parametrize(
    ("loras", "error", "message"),
    [
        ("cat.safetensors", TypeError, r"must be a dict such as .* or a list of files, got 'cat\.safetensors' \(str\)"),
        (None, TypeError, r"must be a dict such as .* got None"),
        ({"": "cat.safetensors"}, TypeError, r"a LoRA's name must be a non-empty string, got ''"),
        ({" \n": "cat.safetensors"}, TypeError, r"a LoRA's name must be a non-empty string, got ' \\n'"),
        ({"\ud800": "cat.safetensors"}, TypeError, "a LoRA's name must be a non-empty string, got '.ud800'"),
        ({"cat": None}, TypeError, "the LoRA 'cat' must be a file, a state dict or a LoRA, got a NoneType"),
        ({"cat": [Path("cat.safetensors")]}, TypeError, "the LoRA 'cat' must be a file, .* got a list"),
        ([b"cat.safetensors"], TypeError, "a list of LoRAs holds files, got a bytes in it"),
        ({1: "cat.safetensors"}, TypeError, r"a LoRA's name must be a non-empty string, got 1 \(int\)"),
        (["a/cat.safetensors", "b/cat.safetensors"], ValueError, "several LoRAs .* the same name: cat, cat"),
        ({"fox": "no/such/fox.safetensors"}, (LoRAError, FileNotFoundError), r"no/such/fox\.safetensors"),
        ({"cat": {}}, ValueError, "'cat' is loaded already. Loaded are: cat"),
        ({}, ValueError, "there is nothing to load"),
        ([], ValueError, "there is nothing to load"),
    ],
)
def test_a_wrong_load_says_what_is_wrong(pipe: Any, loras: Any, error: Any, message: str) -> None:
    pipe.load_loras({"cat": lora_states(pipe)["cat"]})
    with pytest.raises(error, match=message):
        pipe.load_loras(loras)


@pytest.mark.parametrize(
    ("argument", "given", "message"),
    [
        ("triggers", "red dog", "`triggers` must be a dict of LoRAs' names, got 'red dog'"),
        ("triggers", {"dog": 5}, "`triggers` of 'dog' must be a phrase or a list of phrases, got 5"),
        ("triggers", {"dog": {"red": "dog"}}, "`triggers` of 'dog' must be a phrase or a list of phrases"),
        ("roles", "style", "`roles` must be a dict of LoRAs' names, got 'style'"),
    ],
)
def test_what_is_said_of_loras_is_said_by_name(pipe: Any, argument: str, given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pipe.load_loras({"dog": lora_states(pipe)["dog"]}, **{argument: given})
    assert pipe.experts is None


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("cat", TypeError, r"`names` must be None \(all\) or a list of names, got 'cat' \(str\)"),
        (["fox"], ValueError, "`names` has 'fox', which is not loaded. Loaded are: cat"),
    ],
)
def test_a_wrong_unload_says_what_is_wrong(pipe: Any, names: Any, error: Any, message: str) -> None:
    pipe.load_loras({"cat": lora_states(pipe)["cat"]})
    with pytest.raises(error, match=message):
        pipe.unload_loras(names)
    assert pipe.experts.names == ("cat",)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("average", ValueError, r"there is no composition 'average'\. Known are: linear, normalized, .*mole"),
        ("mole", ValueError, r"composition 'mole' needs gates, and none are loaded.*load_gates.*init_gates"),
        (7, TypeError, r"must be a name or a Composition, got 7 \(int\)"),
        (Normalized, TypeError, "must be a name or a Composition"),
    ],
)
def test_a_wrong_method_says_what_is_wrong(pipe: Any, method: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        pipe.set_composition(method)
    assert pipe.composition.name == "budget"


@pytest.mark.parametrize("call", ["init_gates", "load_gates", "save_gates"])
def test_gates_need_loras(pipe: Any, call: str, tmp_path: Path) -> None:
    arguments = [] if call == "init_gates" else [tmp_path]
    with pytest.raises(ValueError, match=f"`{call}` needs LoRAs|there are no gates to save"):
        getattr(pipe, call)(*arguments)
