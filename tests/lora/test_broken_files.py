"""LoRA files and folders that are damaged, or are something else, each with the message it must give."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save, save_file

from mole_diffusion.lora import LoRAError, inspect_lora, load_lora
from tests.lora_files import State, breakable, to_peft


@pytest.fixture
def state(models: dict[str, Any]) -> State:
    return breakable(models)


def _good(state: State) -> bytes:
    return save(state)


FILES: list[tuple[str, str, Callable[[State], bytes], str]] = [
    (
        "truncated in the tensors",
        "cat.safetensors",
        lambda s: _good(s)[:-1],
        "a truncated or damaged safetensors file (",
    ),
    (
        "truncated in the header",
        "cat.safetensors",
        lambda s: _good(s)[:100],
        "a truncated or damaged safetensors file (",
    ),
    ("damaged header", "cat.safetensors", lambda s: _good(s)[:8] + b"{" + _good(s)[8:-1], "a truncated or damaged"),
    ("empty", "cat.safetensors", lambda s: b"", "an empty file. Download or save it again"),
    ("not safetensors", "cat.safetensors", lambda s: b"<!DOCTYPE html><html>", "not a safetensors file. Save"),
    ("pickle by suffix", "cat.pt", _good, "a pickle, which can run any code when opened"),
    ("pickle by suffix, upper case", "cat.CKPT", _good, "a pickle, which can run any code when opened"),
    (
        "pickle by suffix .bin",
        "adapter_model.bin",
        _good,
        "Convert it where you trust it: `safetensors.torch.save_file(",
    ),
    ("pickle by suffix .pth", "cat.pth", _good, "weights_only=True"),
    ("zipped pickle by magic bytes", "cat.safetensors", lambda s: b"PK\x03\x04" + bytes(99), "a pickle, which can run"),
    ("bare pickle by magic bytes", "cat.safetensors", lambda s: b"\x80\x04\x95" + bytes(99), "a pickle, which can run"),
    ("Git LFS pointer", "cat.safetensors", lambda s: b"version https://git-lfs.github.com/spec/v1\n", "`git lfs pull`"),
]


@pytest.mark.parametrize(("name", "content", "message"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_broken_files(name: str, content: Any, message: str, state: State, models: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content(state))
    for read in (lambda: load_lora(path, models), lambda: inspect_lora(path)):
        with pytest.raises(LoRAError, match=re.escape(message)) as error:
            read()
        assert str(error.value).startswith(f"{path}: ")


def test_no_such_file(models: Any, tmp_path: Path) -> None:
    with pytest.raises(
        LoRAError, match=r"somebody/cat-lora: no such file\. Check the path; .* `hf download <repository>`"
    ):
        load_lora("somebody/cat-lora", models)


def test_folders(state: State, models: Any, tmp_path: Path) -> None:
    with pytest.raises(LoRAError, match=r"a folder without a \.safetensors file\. Name the LoRA's file"):
        load_lora(tmp_path, models)
    save_file(state, tmp_path / "b.safetensors")
    assert load_lora(tmp_path, models).name == tmp_path.name
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(
        LoRAError, match=r"a folder with 2 weight files: 'a.safetensors', 'b.safetensors'\. Name one file"
    ):
        load_lora(tmp_path, models)
    models["unet"].save_pretrained(tmp_path / "base" / "unet")
    (tmp_path / "base" / "model_index.json").write_text("{}")
    with pytest.raises(LoRAError, match="base: a whole model, which is no LoRA"):
        load_lora(tmp_path / "base", models)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 8}, "(peft layout): its config says rank 8, the factors have rank 4"),
        ({"r": 4, "use_dora": True}, "its config says DoRA, and a module has no magnitudes"),
        ({"peft_type": "OFT"}, "its config says OFT. Of PEFT's adapters LORA, LOHA, LOKR are read"),
        ({"r": 4, "lora_alpha": "four"}, "alpha 'four' is not a finite number"),
        ({"alpha_pattern": [4]}, "alpha_pattern in its config is no table of regular expressions"),
        (
            {"rank_pattern": {"to_q[": 4}},
            "rank_pattern in its config has a regular expression with a '[' that is not read",
        ),
        ([1], "adapter_config.json is not a JSON object"),
        (None, "adapter_config.json is not JSON ("),
    ],
)
def test_broken_peft_configs(config: Any, message: str, state: State, models: Any, tmp_path: Path) -> None:
    save_file(to_peft(state, "unet"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{" if config is None else json.dumps(config))
    with pytest.raises(LoRAError, match=re.escape(message)):
        load_lora(tmp_path, models)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_broken_header_metadata(text: str, state: State, models: Any, tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    save_file(state, path, metadata={"lora_adapter_metadata": text})
    with pytest.raises(LoRAError, match="header entry 'lora_adapter_metadata' is not a JSON object"):
        load_lora(path, models)
