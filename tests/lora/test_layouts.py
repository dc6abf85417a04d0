"""Every layout of the same numbers gives the same factors, at the right modules, with the right scaling."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from mole_diffusion.lora import LoRA, LoRAFactors, inspect_lora, load_lora
from tests.lora_files import same_factors, to_kohya, to_old, to_peft
from tests.merging import merge
from tests.tiny import (
    ATTENTION,
    CONVOLUTIONS,
    FEED_FORWARD,
    PROJECTIONS,
    TEXT_ENCODER,
    random_lora,
    tiny_components,
)

EVERYTHING = (ATTENTION, FEED_FORWARD, PROJECTIONS, CONVOLUTIONS, TEXT_ENCODER)


@pytest.fixture(scope="module")
def state(models: dict[str, Any]) -> dict[str, Tensor]:
    return random_lora(models, targets=EVERYTHING)


@pytest.fixture(scope="module")
def expected(models: dict[str, Any], state: dict[str, Tensor]) -> LoRA:
    return load_lora(state, models)


def test_factors_are_those_of_the_state_dict(expected: LoRA, state: dict[str, Tensor], models: dict[str, Any]) -> None:
    assert sum(len(modules) for modules in expected.factors.values()) == len(state) // 2
    for component, modules in expected.factors.items():
        for name, factors in modules.items():
            weight = models[component].get_submodule(name).weight
            assert torch.equal(factors.down, state[f"{component}.{name}.lora_A.weight"])
            assert torch.equal(factors.up, state[f"{component}.{name}.lora_B.weight"])
            assert factors.delta().shape == weight.shape
            assert factors.scaling == 1.0
    assert expected.layout == "diffusers"
    assert expected.ranks == (4, 4)


@pytest.mark.parametrize(
    ("layout", "convert"),
    [
        ("kohya", to_kohya),
        ("kohya", lambda state: to_kohya(state, "te1")),
        ("diffusers-old", to_old),
        ("diffusers-old", lambda state: to_old(state, old_text_encoder=True)),
        (
            "diffusers",
            lambda state: {key.replace("text_encoder.", "text_encoder.text_model."): v for key, v in state.items()},
        ),
        ("diffusers", lambda state: {key.replace(".weight", ".default.weight"): v for key, v in state.items()}),
    ],
)
def test_layouts_agree(layout: str, convert: Any, expected: LoRA, state: Mapping[str, Tensor], models: Any) -> None:
    lora = load_lora(convert(state), models)
    assert lora.layout == layout
    same_factors(lora, expected)


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_bare_adapter_finds_the_one_model_it_fits(
    prefix: str, component: str, expected: LoRA, state: Mapping[str, Tensor], models: Any
) -> None:
    lora = load_lora(to_peft(state, component, prefix), models)
    assert lora.layout == "peft"
    assert list(lora.factors) == [component]
    for name, factors in lora.factors[component].items():
        assert torch.equal(factors.delta(), expected.factors[component][name].delta())


@pytest.mark.parametrize("place", ["unet._orig_mod.", "unet.mid_block._orig_mod."])
def test_names_of_a_compiled_model_are_those_of_the_model(
    place: str, expected: LoRA, state: Mapping[str, Tensor], models: Any
) -> None:
    renamed = {key.replace(place.replace("_orig_mod.", ""), place): value for key, value in state.items()}
    assert renamed.keys() != state.keys()
    for spelled in (renamed, to_kohya(renamed)):
        lora = load_lora(spelled, models)
        same_factors(lora, expected)
        assert lora.fingerprint == expected.fingerprint
    compiled = {**models, "unet": torch.compile(models["unet"], backend="eager")}
    same_factors(load_lora(renamed, compiled), expected)


def test_unet_keys_without_component(expected: LoRA, state: Mapping[str, Tensor], models: Any) -> None:
    """What `unet.save_attn_procs` wrote."""
    old = {key.removeprefix("unet."): v for key, v in to_old(state).items() if key.startswith("unet.")}
    assert load_lora(old, models).factors["unet"].keys() == expected.factors["unet"].keys()


def test_alpha_and_rank_of_each_module(models: Any) -> None:
    small = random_lora(models, rank=2, alpha=1.0, targets=TEXT_ENCODER)
    large = random_lora(models, rank=8, alpha=16.0, targets=ATTENTION)
    for convert in (dict, to_kohya):
        lora = load_lora(convert({**small, **large}), models)
        assert lora.ranks == (2, 8)
        assert {f.scaling for f in lora.factors["text_encoder"].values()} == {0.5}
        assert {f.scaling for f in lora.factors["unet"].values()} == {2.0}


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_from_diffusers_metadata(rslora: bool, models: Any, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    config = {
        "unet.r": 4,
        "unet.lora_alpha": 8,
        "unet.alpha_pattern": {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 2},
        "text_encoder.r": 4,
        "text_encoder.lora_alpha": 1,
        "unet.use_rslora": rslora,
    }
    save_file(random_lora(models), path, metadata={"lora_adapter_metadata": json.dumps(config)})
    factors = load_lora(path, models).factors
    root = math.sqrt(4) if rslora else 4
    patterned = factors["unet"].pop("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    assert patterned.scaling == 2 / root
    assert {f.scaling for f in factors["unet"].values()} == {8 / root}
    assert {f.scaling for f in factors["text_encoder"].values()} == {0.25}


def test_a_folder_saved_by_peft(models: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    unet = tiny_components()["unet"]
    config = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=["to_q", "to_k"],
        rank_pattern={"attn1.to_k": 8},
        alpha_pattern={"attn2.to_q": 6},
    )
    adapter = get_peft_model(unet, config)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapter.save_pretrained(tmp_path / "cat")
    lora = load_lora(tmp_path / "cat", models)
    assert (lora.layout, lora.name, list(lora.factors)) == ("peft", "cat", ["unet"])
    wrapped = {name: m for name, m in unet.named_modules() if hasattr(m, "lora_A")}
    assert wrapped.keys() == lora.factors["unet"].keys()
    for name, factors in lora.factors["unet"].items():
        assert factors.scaling == wrapped[name].scaling["default"], name
        assert torch.allclose(factors.delta(), wrapped[name].get_delta_weight("default"), atol=1e-6)


def test_linear_and_1x1_convolution_hold_the_same_numbers(
    expected: LoRA, state: dict[str, Tensor], models: Any
) -> None:
    def other(tensor: Tensor) -> Tensor:
        if tensor.ndim == 2:
            return tensor[:, :, None, None]
        return tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor

    swapped = {key: other(value) for key, value in state.items()}
    assert any(value.ndim != state[key].ndim for key, value in swapped.items())
    same_factors(load_lora(swapped, models), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_into_fp32(dtype: torch.dtype, state: dict[str, Tensor], models: Any) -> None:
    half = {key: value.to(dtype) for key, value in state.items()}
    for component, modules in load_lora(half, models).factors.items():
        for name, factors in modules.items():
            assert factors.down.dtype == factors.up.dtype == torch.float32
            assert torch.equal(factors.up, half[f"{component}.{name}.lora_B.weight"].float())


def test_text_encoder_with_text_model_inside() -> None:
    """`CLIPTextModelWithProjection` still nests `text_model`; `text_projection` lies outside of it."""
    config = CLIPTextConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    models = {"text_encoder_2": CLIPTextModelWithProjection(config)}
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    down_p, up_p = torch.randn(2, 8), torch.randn(config.projection_dim, 2)
    names = {"encoder.layers.0.self_attn.q_proj": (down, up), "text_projection": (down_p, up_p)}
    for prefix in ("", "text_model."):
        state = {}
        for name, (a, b) in names.items():
            stem = f"text_encoder_2.{prefix if name.startswith('enc') else ''}{name}"
            state |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        found = load_lora(state, models).factors["text_encoder_2"]
        assert set(found) == {"text_model.encoder.layers.0.self_attn.q_proj", "text_projection"}
    kohya = {
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": down,
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": up,
    }
    assert list(load_lora(kohya, models).factors["text_encoder_2"]) == ["text_model.encoder.layers.0.self_attn.q_proj"]


def test_reading_changes_neither_model_nor_source(models: Any, state: dict[str, Tensor]) -> None:
    before = models["unet"].conv_in.weight.clone()
    lora = load_lora(state, models)
    next(iter(lora.factors["unet"].values())).up.zero_()
    assert all(value.abs().sum() > 0 for value in state.values())
    merge(tiny_components(), lora)
    assert torch.equal(models["unet"].conv_in.weight, before)


def test_name_source_and_hash(models: Any, state: dict[str, Tensor], tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "my.cat.safetensors"
    save_file(state, path)
    lora = load_lora(path, models)
    assert (lora.name, lora.source) == ("my.cat", str(path))
    assert lora.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_lora(str(path), models, name="cat").name == "cat"
    reordered = dict(reversed(list(state.items())))
    changed = {**state, next(iter(state)): next(iter(state.values())) + 1}
    one, same, other = (load_lora(s, models).sha256 for s in (state, reordered, changed))
    assert one == same != other


def test_a_header_that_starts_like_a_pickle_is_no_pickle(models: Any, tmp_path: Path) -> None:
    """A header of 0x0280 bytes begins with the two bytes of pickle protocol 2."""
    state = random_lora(models, targets="mid_block.*attn1.to_q$")
    path = tmp_path / "lora.safetensors"
    for padding in range(400):
        save_file(state, path, metadata={"note": "x" * padding})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert len(load_lora(path, models).factors["unet"]) == 1


def test_inspect_needs_no_model(models: Any, tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    save_file(
        to_kohya(
            {
                **random_lora(models, rank=2, alpha=1.0, targets=TEXT_ENCODER),
                **random_lora(models, rank=8, alpha=4.0, targets=ATTENTION),
            }
        ),
        path,
    )
    report = inspect_lora(path)
    assert report.layout == "kohya"
    in_unet = 4 * 2 * 4  # transformer blocks, attentions, projections
    assert report.modules == {"unet": in_unet, "text_encoder": 12}
    assert report.ranks == {2: 12, 8: in_unet}
    assert report.alphas == (1.0, 4.0)
    assert report.family == "unknown"


def test_factors_must_belong_together() -> None:
    with pytest.raises(ValueError, match=r"`down` \(4, 8\) and `up` \(8, 3\) are not factors of one module"):
        LoRAFactors(torch.zeros(4, 8), torch.zeros(8, 3))
