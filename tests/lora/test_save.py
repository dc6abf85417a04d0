"""What `save_lora` writes: the same factors again, the same bytes again, never half a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mole_diffusion.lora import LoRA, LoRAError, LoRAFactors, load_lora, save_lora
from tests.lora_files import same_factors
from tests.tiny import CONVOLUTIONS, TEXT_ENCODER, random_lora


@pytest.fixture(scope="module")
def lora(models: dict[str, Any]) -> LoRA:
    state = random_lora(models, rank=4, alpha=2.0, targets=("attn2", TEXT_ENCODER, CONVOLUTIONS))
    return load_lora(state, models)


def test_kohya_keeps_the_factors_as_they_are(lora: LoRA, models: Any, tmp_path: Path) -> None:
    again = load_lora(save_lora(lora, tmp_path / "lora.safetensors", layout="kohya"), models)
    assert again.layout == "kohya"
    same_factors(again, lora)


def test_diffusers_folds_the_scaling_into_up(lora: LoRA, models: Any, tmp_path: Path) -> None:
    again = load_lora(save_lora(lora.factors, tmp_path / "lora.safetensors"), models)
    assert again.layout == "diffusers"
    for component, modules in lora.factors.items():
        for name, factors in modules.items():
            twin = again.factors[component][name]
            assert twin.scaling == 1.0
            assert torch.equal(twin.down, factors.down)
            assert torch.equal(twin.up, 0.5 * factors.up)


def test_text_encoder_keys_are_those_other_programs_know(lora: LoRA, tmp_path: Path) -> None:
    for layout, key in (
        ("diffusers", "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"),
        ("kohya", "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"),
    ):
        with safe_open(save_lora(lora, tmp_path / "l.safetensors", layout=layout), "pt") as file:  # type: ignore[arg-type]
            assert key in file.keys()


def test_two_text_encoders_in_kohya_keys(tmp_path: Path) -> None:
    factors = {"encoder.layers.0.mlp.fc1": LoRAFactors(torch.ones(2, 4), torch.ones(4, 2), 0.5)}
    path = save_lora({"text_encoder": factors, "text_encoder_2": factors}, tmp_path / "l.safetensors", layout="kohya")
    with safe_open(path, "pt") as file:
        assert {key.split("_text_model")[0] for key in file.keys()} == {"lora_te1", "lora_te2"}
        assert file.get_tensor("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha").item() == 1.0


def test_the_same_bytes_again(lora: LoRA, tmp_path: Path) -> None:
    """The hash identifies a LoRA, and safetensors alone would order the header's metadata at random."""
    metadata = {letter: letter for letter in "abcdefgh"}
    first, second = (save_lora(lora, tmp_path / f"{i}.safetensors", metadata=metadata) for i in range(2))
    assert first.read_bytes() == second.read_bytes()
    with safe_open(first, "pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    lora: LoRA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_lora(lora, tmp_path / "new" / "lora.safetensors")
    before = path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        save_lora(lora, path, layout="kohya")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_wrong_calls(lora: LoRA, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`path` is '.*lora.bin'.*end in .safetensors"):
        save_lora(lora, tmp_path / "lora.bin")
    with pytest.raises(ValueError, match=r"`layout` is 'a1111'; choose one of diffusers, kohya"):
        save_lora(lora, tmp_path / "lora.safetensors", layout="a1111")  # type: ignore[arg-type]
    with pytest.raises(LoRAError, match="no factors to save"):
        save_lora({}, tmp_path / "lora.safetensors")
    with pytest.raises(LoRAError, match=r"kohya layout, component transformer\): no name .* layout='diffusers'"):
        save_lora({"transformer": {}}, tmp_path / "lora.safetensors", layout="kohya")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_half_precision_halves_the_file_and_rounds_once(lora: LoRA, models: Any, tmp_path: Path, layout: Any) -> None:
    whole = save_lora(lora, tmp_path / "whole.safetensors", layout=layout)
    half = save_lora(lora, tmp_path / "half.safetensors", layout=layout, dtype=torch.float16)
    with safe_open(half, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}
    assert half.stat().st_size < 0.75 * whole.stat().st_size
    first, second = (load_lora(path, models).factors["unet"] for path in (whole, half))
    for name, factors in first.items():
        assert torch.equal(second[name].down, factors.down.half().float())


def test_a_factor_too_large_for_half_precision_is_refused(tmp_path: Path) -> None:
    factors = {"unet": {"proj_in": LoRAFactors(torch.full((2, 4), 1e6), torch.ones(4, 2))}}
    with pytest.raises(ValueError, match=r"1 tensors of the LoRA are not finite in torch\.float16.*torch\.bfloat16"):
        save_lora(factors, tmp_path / "lora.safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
