"""Blocks of diffusers' modular pipelines with LoRAs composed inside: their picture is that of our own pipelines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from mole_diffusion.errors import MoLEError
from mole_diffusion.gating import GateConfig
from mole_diffusion.lora import load_lora, save_lora
from tests import ROOT
from tests.families.contract import assert_other, assert_same, lora_state
from tests.tiny.dits import CALL, SIZE, tiny_parts
from tests.tiny.families import sd3, sdxl

modular = pytest.importorskip("mole_diffusion.pipelines.modular", reason="an older diffusers", exc_type=ImportError)

PROMPT = "a cat and a dog"
WORDS = {"cat": "cat", "dog": "dog"}
GUIDANCE = 3.0
SAND = {"negative_prompt": "sand"}

# The blocks, the family's components, what both pipelines are given, and what ours alone: there a guider guides.
FAMILIES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "sdxl": (modular.MoLEStableDiffusionXLBlocks, {}, {"guidance_scale": GUIDANCE}),
    "sd3": (modular.MoLEStableDiffusion3Blocks, SAND, {"guidance_scale": GUIDANCE}),
    "flux": (modular.MoLEFluxBlocks, CALL["flux"], {}),
    "flux2": (modular.MoLEFlux2Blocks, CALL["flux2"], {}),
    "flux2_klein": (modular.MoLEFlux2KleinBaseBlocks, {"max_sequence_length": 48}, {"guidance_scale": GUIDANCE}),
    # These two count guidance from 0.
    "z_image": (modular.MoLEZImageBlocks, {"max_sequence_length": 48}, {"guidance_scale": GUIDANCE - 1}),
    "krea2": (modular.MoLEKrea2Blocks, {"max_sequence_length": 32}, {"guidance_scale": GUIDANCE - 1}),
    "qwen_image": (modular.MoLEQwenImageBlocks, SAND, {"true_cfg_scale": GUIDANCE}),
}


def parts_of(family: str) -> dict[str, Any]:
    made = {"sdxl": sdxl, "sd3": sd3}.get(family)
    return tiny_parts(family) if made is None else made()


def pipes(family: str) -> tuple[Any, Any]:
    """A modular pipeline of ours and one for the task, with the same models."""
    blocks, parts = FAMILIES[family][0], parts_of(family)
    pipe = with_parts(blocks(), parts)
    task: Any = blocks.task(**parts)
    task.set_progress_bar_config(disable=True)
    return pipe, task


def with_parts(blocks: Any, parts: dict[str, Any]) -> Any:
    """A pipeline of these blocks on these models, guided."""
    pipe = blocks.init_pipeline()
    guider = {"guider": diffusers.ClassifierFreeGuidance(guidance_scale=GUIDANCE)} if hasattr(pipe, "guider") else {}
    pipe.update_components(**{name: part for name, part in parts.items() if name in pipe.component_names}, **guider)
    return pipe


def given(family: str, **kwargs: Any) -> dict[str, Any]:
    """What both are given."""
    return {
        "prompt": PROMPT,
        "num_inference_steps": 3,
        "height": SIZE,
        "width": SIZE,
        "output_type": "pt",
        "generator": torch.manual_seed(0),
        **FAMILIES[family][1],
        **kwargs,
    }


def states(task: Any) -> dict[str, Any]:
    return {name: lora_state(task, seed) for seed, name in enumerate(WORDS)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_picture_is_that_of_the_pipeline_for_the_task(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By masks, which read the prompt and look at a pass without LoRAs first."""
    monkeypatch.setattr(
        "diffusers.modular_pipelines.krea2.encoders.KREA2_TEXT_ENCODER_SELECT_LAYERS", (1, 2)
    )  # of 36 in the real encoder
    pipe, task = pipes(family)
    if family == "flux2":  # one character of whose system message is another in diffusers' block
        task.system_message = task.system_message.replace("\n", " ")
    drawn = pipe(**given(family), lora_files=states(task), triggers=WORDS)
    expected = task(**given(family), **FAMILIES[family][2]).images
    assert task.composition.name == "masks"
    assert_same(drawn.get("images"), expected)
    assert torch.equal(drawn.get("masks").values, task.masks.values)


@pytest.fixture(scope="module")
def sdxl_pipes() -> tuple[Any, Any]:
    pipe, task = pipes("sdxl")
    pipe(**given("sdxl", num_inference_steps=1), lora_files=states(task), triggers=WORDS)
    return pipe, task


def test_a_call_chooses_and_scales_among_the_loras_that_stayed(sdxl_pipes: tuple[Any, Any]) -> None:
    pipe, task = sdxl_pipes
    beside = {"loras": {"cat": 0.5}, "cross_attention_kwargs": {"scale": 0.5}}
    assert_same(
        pipe(**given("sdxl"), **beside, output="images"),
        task(**given("sdxl"), **beside, guidance_scale=GUIDANCE).images,
    )
    bare = pipe(**given("sdxl"), loras=[], output="images")
    stock = with_parts(FAMILIES["sdxl"][0].stock(), sdxl())
    assert torch.equal(stock(**given("sdxl"), output="images"), bare)


def test_regions_and_gates_are_those_of_our_pipelines(sdxl_pipes: tuple[Any, Any], tmp_path: Path) -> None:
    pipe, task = sdxl_pipes
    boxes = {"cat": (0, 0, 0.5, 1), "dog": (0.5, 0, 1, 1)}
    drawn = pipe(**given("sdxl"), regions=boxes)
    assert_same(drawn.get("images"), task(**given("sdxl"), regions=boxes, guidance_scale=GUIDANCE).images)
    assert drawn.get("masks").fixed == ("cat", "dog")

    gates = task.init_gates(GateConfig(scope="network"))
    with torch.no_grad():
        for number, parameter in enumerate(gates.gate_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    expected = task(**given("sdxl"), guidance_scale=GUIDANCE).images
    task.save_gates(tmp_path / "gates")
    task.unload_gates()
    assert_same(pipe(**given("sdxl"), gates=str(tmp_path / "gates"), output="images"), expected)
    # They stay, and another method may be named.
    assert_same(pipe(**given("sdxl"), output="images"), expected)
    assert_other(pipe(**given("sdxl"), composition="linear", output="images"), expected)
    task.unload_gates()
    task.set_composition(None)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"regions": {"cat": {"region": (0, 0, 1, 1), "prompt": "a cat"}}}, r"no block here reads.*MoLEStableDiff"),
        ({"triggers": WORDS}, "belong to `lora_files`"),
        ({"prompt": "a mug"}, "lacks the words that call a LoRA"),
        ({"clip_skip": -1}, "a whole number from 0 to 1 here, or None, got -1"),
        ({"loras": ["bird"]}, "'bird', which is not loaded"),
        ({"lora_files": {"cat": {}}}, "no tensors in it"),
    ],
)
def test_what_cannot_be_is_refused_and_what_is_loaded_stays(
    sdxl_pipes: tuple[Any, Any], asked: dict[str, Any], said: str
) -> None:
    pipe, task = sdxl_pipes
    with pytest.raises(MoLEError, match=said):
        pipe(**given("sdxl", **asked))
    assert task.experts.names == ("cat", "dog")


def test_blocks_are_published_as_diffusers_publishes_blocks(
    tmp_path: Path, sdxl_pipes: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snippet of docs/diffusers.md: a folder of its own for any base, and one with a base in it."""
    _, task = sdxl_pipes
    task.save_pretrained(tmp_path / "base")
    for name, state in states(task).items():
        save_lora(load_lora(state, task.lora_components, name=name), tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"<!-- downloads -->\n```python\n(.*?)```", (ROOT / "docs" / "diffusers.md").read_text(), re.S)
    text = text.replace("stabilityai/stable-diffusion-xl-base-1.0", "base")
    names: dict[str, Any] = {}
    exec(text.replace("regions=regions", "regions=regions, num_inference_steps=2"), names)
    assert type(names["pipe"]).__name__ == "StableDiffusionXLModularPipeline"
    regions = names["regions"]
    (image,) = names["state"].get("images")
    expected = task(names["prompt"], loras=["cat", "dog"], regions=regions, generator=torch.manual_seed(0),
                    num_inference_steps=2, guidance_scale=7.5).images[0]  # fmt: skip
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 1

    modular.MoLEStableDiffusionXLBlocks().save_pretrained("base")
    opened = diffusers.ModularPipeline.from_pretrained("base", trust_remote_code=True)
    assert type(opened.blocks) is modular.MoLEStableDiffusionXLBlocks


def test_blocks_of_somebody_else_are_not_written_over(tmp_path: Path) -> None:
    blocks = modular.MoLEStableDiffusionXLBlocks()
    blocks.save_pretrained(tmp_path)
    blocks.save_pretrained(tmp_path)
    (tmp_path / "block.py").write_text("# mine")
    with pytest.raises(MoLEError, match=r"block\.py is of other blocks, and would be replaced"):
        blocks.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block.py", "modular_config.json"]


def test_our_inputs_and_outputs_are_told() -> None:
    told = modular.MoLEFluxBlocks().doc
    for name in ("prompt", "lora_files", "triggers", "roles", "gates", "composition", "loras", "regions", "masks"):
        assert f"{name} (" in told
