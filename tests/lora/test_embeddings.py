"""Embeddings inside LoRA files: read beside the factors, handed to diffusers' textual inversion, or refused by name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mole_diffusion.errors import MoLEError
from mole_diffusion.lora import LoRAError, convert_lora, inspect_lora, load_lora
from mole_diffusion.pipelines import MoLEStableDiffusionPipeline, MoLEStableDiffusionXLPipeline
from tests.lora_files import to_kohya
from tests.tiny import HIDDEN, families, random_lora, tiny_pipeline

QUERIES = r"unet.mid_block.*attn1\.to_q$"
KEY = "bundle_emb.<it>.string_to_param.*"
PROMPT = "a photo of <it>"


@pytest.fixture
def state(models: dict[str, Any]) -> dict[str, Tensor]:
    """A LoRA with two vectors for one word."""
    torch.manual_seed(0)
    return {**to_kohya(random_lora(models, targets=QUERIES)), KEY: torch.randn(2, HIDDEN)}


def embeds(pipe: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    return found


def test_a_file_keeps_its_words(state: dict[str, Tensor], models: Any, tmp_path: Path) -> None:
    save_file(state, tmp_path / "it.safetensors")
    lora, report = load_lora(tmp_path / "it.safetensors", models), inspect_lora(tmp_path / "it.safetensors")
    assert torch.equal(lora.embeddings["<it>"]["text_encoder"], state[KEY])
    assert lora.triggers == report.triggers == ("<it>",)
    assert report.embeddings == {"<it>": 2}
    bare = load_lora({key: value for key, value in state.items() if key != KEY}, models)
    assert bare.fingerprint != lora.fingerprint
    one = {**state, KEY: state[KEY][0].bfloat16()}
    assert load_lora(one, models).embeddings["<it>"]["text_encoder"].shape == (1, HIDDEN)


def test_a_pipeline_knows_the_words_as_stock_diffusers_does(state: dict[str, Tensor]) -> None:
    pipe, stock = tiny_pipeline(MoLEStableDiffusionPipeline), tiny_pipeline()
    before = embeds(pipe)
    pipe.load_loras({"it": state})
    lora = pipe._loaded.loras["it"]
    stock.load_textual_inversion(lora.embeddings["<it>"]["text_encoder"], token="<it>")
    assert torch.equal(embeds(pipe), embeds(stock))
    assert not torch.equal(embeds(pipe), before)
    assert pipe.triggers == {"it": ("<it>",)}
    assert pipe(PROMPT, num_inference_steps=2, output_type="np").images[0].std() > 0  # found in the prompt
    kept = {name: value.clone() for name, value in tiny_pipeline().text_encoder.state_dict().items()}
    pipe.unload_loras()
    after = pipe.text_encoder.state_dict()
    assert after.keys() == kept.keys()
    assert all(torch.equal(after[name], value) for name, value in kept.items())
    assert torch.equal(embeds(pipe), before)


def test_two_encoders_get_their_own_vectors(models: Any) -> None:
    pipe = MoLEStableDiffusionXLPipeline(**families.sdxl())
    torch.manual_seed(1)
    state = random_lora({"unet": pipe.unet}, targets=r"mid_block.*attn1\.to_q$")
    pairs = {"clip_l": torch.randn(1, HIDDEN), "clip_g": torch.randn(1, families.WIDTH)}
    pipe.load_loras({"it": {**state, **{f"bundle_emb.<it>.{part}": value for part, value in pairs.items()}}})
    for part, (tokenizer, encoder) in {
        "clip_l": (pipe.tokenizer, pipe.text_encoder),
        "clip_g": (pipe.tokenizer_2, pipe.text_encoder_2),
    }.items():
        (place,) = tokenizer("<it>", add_special_tokens=False).input_ids
        assert torch.equal(encoder.get_input_embeddings().weight[place], pairs[part][0])
    pipe.unload_loras(["it"])
    assert len(pipe.tokenizer_2) == pipe.text_encoder_2.get_input_embeddings().num_embeddings
    assert "<it>" not in pipe.tokenizer.get_vocab()


def test_words_that_are_taken_are_refused_with_a_remedy_that_works(state: dict[str, Tensor]) -> None:
    pipe = tiny_pipeline(MoLEStableDiffusionPipeline)
    pipe.load_loras({"one": state})
    other = {**state, KEY: state[KEY] + 1}
    with pytest.raises(MoLEError, match="brings an embedding of '<it>', and its tokenizer has that token") as error:
        pipe.load_loras({"two": other})
    assert pipe.experts.names == ("one",)
    code = re.findall(r"`([^`]*)`", str(error.value))
    names = {"dataclasses": dataclasses, "file": other, "pipe": pipe, "load_lora": load_lora}
    names["load_loras"] = pipe.load_loras
    for line in code:
        exec(line, names)
    assert pipe.experts.names == ("one", "two")
    assert "<two>_1" in pipe.tokenizer.get_vocab()
    both = tiny_pipeline(MoLEStableDiffusionPipeline)
    with pytest.raises(MoLEError, match="LoRA 'two' brings an embedding of '<it>', and LoRA 'one' brings one too"):
        both.load_loras({"one": state, "two": other})
    assert both.experts is None
    assert torch.equal(embeds(both), embeds(tiny_pipeline()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bundle_emb.<it>.t5": torch.ones(1, HIDDEN)},
            "a textual-inversion embedding of a kind that is not read: 'bundle_emb.<it>.t5'",
        ),
        (
            {"bundle_emb.<it>.clip_l_out": torch.ones(1, HIDDEN)},
            "a textual-inversion embedding of a kind that is not read",
        ),
        ({KEY: torch.ones(2, HIDDEN, 1)}, "holds no vectors: torch.float32 of shape (2, 32, 1)"),
        ({KEY: torch.ones(2, HIDDEN, dtype=torch.int8)}, "holds no vectors: torch.int8"),
        ({KEY: torch.ones(2, HIDDEN) / 0}, f"NaN or infinity: '{KEY}'"),
        ({"bundle_emb.<it>.clip_l": torch.ones(HIDDEN)}, "two textual-inversion embeddings of '<it>' for text_encoder"),
        ({"bundle_emb.\x1b[2J.clip_l": torch.ones(HIDDEN)}, "whose word nobody can write"),
        (
            {KEY: torch.ones(2, 768)},
            "its textual-inversion embedding of '<it>' has vectors of width 768, and text_encoder's have 32",
        ),
        ({"bundle_emb.<it>.clip_g": torch.ones(HIDDEN)}, "of width 32, and there is no text_encoder_2"),
    ],
)
def test_what_is_no_embedding_for_the_model_is_refused(
    change: dict[str, Tensor], message: str, state: dict[str, Tensor], models: Any
) -> None:
    with pytest.raises(LoRAError, match=re.escape(message)):
        load_lora({**state, **change}, models)


def test_a_family_without_textual_inversion_refuses_them() -> None:
    from mole_diffusion.pipelines import MoLEStableDiffusion3Pipeline

    pipe = MoLEStableDiffusion3Pipeline(**families.sd3())
    state = random_lora({"transformer": pipe.transformer}, targets=r"blocks\.0\.attn\.to_q$")
    with pytest.raises(MoLEError, match="MoLEStableDiffusion3Pipeline has no textual inversion"):
        pipe.load_loras({"it": {**state, KEY: torch.ones(1, families.WIDTH)}})
    assert pipe.experts is None


def test_converting_keeps_them_or_refuses(state: dict[str, Tensor], models: Any, tmp_path: Path) -> None:
    save_file(state, tmp_path / "it.safetensors")
    kept = convert_lora(tmp_path / "it.safetensors", tmp_path / "kohya.safetensors", "kohya", models)
    assert torch.equal(load_file(kept)[KEY], state[KEY])
    assert load_lora(kept, models).fingerprint == load_lora(state, models).fingerprint
    with pytest.raises(LoRAError, match=r"an embedding inside, which has no place in diffusers's layout"):
        convert_lora(tmp_path / "it.safetensors", tmp_path / "d.safetensors", "diffusers", models)
    assert not (tmp_path / "d.safetensors").exists()
