"""LoRA files that were made to do harm, or that do nothing: one line each, at once, in bounded memory."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from mole_diffusion.errors import MoLEError, printable
from mole_diffusion.lora import LoRAError, LoRAFactors, inspect_lora, load_lora, save_lora
from mole_diffusion.reading import parse_json
from tests.lora_files import to_kohya, to_peft
from tests.tiny import random_lora, tiny_components

QUERIES = r"attn1\.to_q$"


@pytest.fixture
def state(models: dict[str, Any]) -> dict[str, Tensor]:
    return random_lora(models, targets=QUERIES)


def refused(path: Any, models: Any, message: str) -> None:
    before = time.process_time()
    for read in (lambda: load_lora(path, models), lambda: inspect_lora(path)):
        with pytest.raises(LoRAError, match=message) as error:
            read()
        text = str(error.value)
        assert text.isprintable()
        assert len(text) <= 2000
    assert time.process_time() - before < 2


def with_header(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_pipes_devices_and_sparse_files_are_refused_before_they_are_opened(
    state: dict[str, Tensor], models: Any, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors", models, "a pipe, not a file")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    refused(tmp_path / "zero.safetensors", models, "a device, not a file")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    refused(tmp_path / "loop.safetensors", models, "cannot be opened")
    refused(f"{'x' * 5000}.safetensors", models, "cannot be opened")
    refused("a\0b.safetensors", models, "cannot be opened")
    sparse = tmp_path / "sparse.safetensors"
    sparse.write_bytes(save(state))
    os.truncate(sparse, 200 * 2**30)
    refused(sparse, models, "a file of 214,748,364,800 bytes; at most")
    header = {"unet.x.lora_A.weight": {"dtype": "F32", "shape": [25 * 2**30, 2], "data_offsets": [0, 200 * 2**30]}}
    sparse.write_bytes(with_header(header))
    os.truncate(sparse, sparse.stat().st_size + 200 * 2**30)
    refused(sparse, models, "a file of 214,748,")


def test_pipes_beside_a_file_are_refused_too(state: dict[str, Tensor], models: Any, tmp_path: Path) -> None:
    save_file(to_peft(state, "unet"), tmp_path / "adapter_model.safetensors")
    os.mkfifo(tmp_path / "adapter_config.json")
    refused(tmp_path, models, "adapter_config.json is a pipe, not a file")


def test_a_rank_that_fills_the_memory_is_refused_in_the_header(models: Any, tmp_path: Path) -> None:
    """Gates keep r x r numbers of every module: 50,000 of them are 10 GB, from a file of 4 MB."""
    rank, keys = 50_000, [f"lora_unet_conv_in.lora_{kind}.weight" for kind in ("down", "up")]
    shapes = [[rank, 4, 3, 3], [32, rank, 1, 1]]
    sizes = [rank * 36, rank * 32]
    header = {
        key: {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [start, start + size]}
        for key, shape, start, size in zip(keys, shapes, (0, sizes[0]), sizes, strict=True)
    }
    path = tmp_path / "wide.safetensors"
    path.write_bytes(with_header(header, bytes(sum(sizes))))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, models, "rank 50000 for a module of 36 by 32 numbers")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (with_header({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"\0"), "values of type F4|damaged"),
        (with_header({"x": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)), "C64|damaged"),
        (with_header({"x": {"dtype": "NO", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)), "damaged"),
        (with_header({"x": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}, bytes(8)), "damaged"),
        (with_header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}, bytes(8)), "damaged"),
        (with_header({"x" * 2**20: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"\0"), "1,048,576 char"),
        (with_header(b'{"a":' + b"[" * 200_000), "damaged"),
        (with_header({"__metadata__": {"a": {"b": 1}}}), "damaged"),
        (with_header({"__metadata__": {}}), "no tensors in it"),
        (struct.pack("<Q", 2**63) + b"{}", "its header goes beyond its end"),
        (b"\0" * 9, "not a safetensors file"),
        (b"x", "not a safetensors file"),
    ],
)
def test_headers_that_are_none(content: bytes, message: str, models: Any, tmp_path: Path) -> None:
    (tmp_path / "cat.safetensors").write_bytes(content)
    refused(tmp_path / "cat.safetensors", models, message)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":' * 100_000,
        '{"unet.r": ' + "9" * 5000 + "}",
        '{"unet.lora_alpha": 1e999}',
        '{"unet.lora_alpha": NaN}',
        '{"unet.r": 4, "unet.r": 8}',
        '{"unet.alpha_pattern": {"(a+)+$": 1, "(": 2}}',
        '{"unet.rank_pattern": 3}',
        '{"unet.r": {"x": 1}}',
        '{"unet.peft_type": "\\u001b[31m"}',
        '{"unet.peft_type": ["LORA"]}',
        "\x1b]0;owned\x07",
    ],
)
def test_metadata_is_hostile_input(text: str, state: dict[str, Tensor], models: Any, tmp_path: Path) -> None:
    save_file(state, tmp_path / "cat.safetensors", metadata={"lora_adapter_metadata": text})
    refused(tmp_path / "cat.safetensors", models, "cat.safetensors")
    save_file(to_peft(state, "unet"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text.replace("unet.", ""))
    refused(tmp_path / "adapter_model.safetensors", models, "adapter_model.safetensors")


def test_names_of_a_file_do_not_act_on_the_terminal(state: dict[str, Tensor], models: Any, tmp_path: Path) -> None:
    name = "\x1b[2J\x1b]0;owned\x07\u202e"
    refused({f"unet.{name}.lora_A.weight": torch.ones(1, 2)}, models, r"\\x1b\[2J")
    refused({**state, name: torch.ones(1)}, models, r"\\x1b\[2J")
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(b"")
    refused(path, models, "an empty file")
    assert printable("a" * 10**6, 50) == "a" * 24 + "…" + "a" * 24
    assert str(MoLEError("one\n two")) == "one two"


def test_states_that_are_no_tensors(models: Any) -> None:
    refused({1: torch.ones(1)}, models, "a key that is a int")
    refused({"a": torch.ones(2, 2).to_sparse()}, models, "a tensor without plain values")
    refused({"a": torch.ones(2, device="meta")}, models, "a tensor without plain values")


def test_strict_json() -> None:
    assert parse_json('{"a": [1, {"b": 2}]}') == {"a": [1, {"b": 2}]}
    assert parse_json('["\\ud83d\\ude00"]') == ["\U0001f600"]
    for text, message in (
        ('{"a": 1, "a": 2}', "key 'a' twice"),
        ("[NaN]", "NaN, which"),
        ("[" * 10**5, "nested"),
        ('{"\\uD800": 1}', "half a UTF-16 pair"),
        ('["a\\udc00"]', "half a UTF-16 pair"),
    ):
        with pytest.raises(MoLEError, match=message):
            parse_json(text)


ZEROS = {
    "a product that is zero": lambda down, up: (torch.cat([down[:2], down[:2]]), torch.cat([up[:, :2], -up[:, :2]], 1)),
    "tiny factors": lambda down, up: (down * 1e-30, up * 1e-30),
    "one tiny factor": lambda down, up: (down, up * 1e-30),
    "below the base's last digit": lambda down, up: (down, up * 1e-13),
    "no up": lambda down, up: (down, up * 0),
}


@pytest.mark.parametrize("change", ZEROS.values(), ids=ZEROS.keys())
def test_a_lora_that_changes_nothing_is_an_error(change: Any, state: dict[str, Tensor], models: Any) -> None:
    broken = {}
    for key in [key for key in state if "lora_A" in key]:
        up = key.replace("lora_A", "lora_B")
        broken[key], broken[up] = change(state[key], state[up])
    with pytest.raises(LoRAError, match="would change nothing"):
        load_lora(broken, models)
    one = next(key for key in state if "lora_A" in key)  # one module that acts is enough
    load_lora({**broken, one: state[one], one.replace("_A", "_B"): state[one.replace("_A", "_B")]}, models)


def test_a_lora_whose_alpha_vanishes_is_an_error(state: dict[str, Tensor], models: Any) -> None:
    for alpha in (0.0, 1e-38, -1e-44):
        alphas = {key.replace("lora_A.weight", "alpha"): torch.tensor(alpha) for key in state if "lora_A" in key}
        with pytest.raises(LoRAError, match="would change nothing"):
            load_lora({**state, **alphas}, models)


def test_a_lora_that_vanishes_in_the_precision_of_the_base_is_an_error(state: dict[str, Tensor]) -> None:
    half = {key: value * 1e-5 if "lora_B" in key else value for key, value in state.items()}
    load_lora(half, tiny_components())
    with pytest.raises(LoRAError, match="too small for the base's precision"):
        load_lora({k: v * 1e-4 for k, v in half.items()}, {"unet": tiny_components()["unet"].to(torch.float16)})


def test_a_lora_that_overflows_is_an_error(state: dict[str, Tensor], models: Any) -> None:
    large = {key: value * 1e6 if "lora_B" in key else value for key, value in state.items()}
    load_lora(large, models)
    with pytest.raises(LoRAError, match="too large for the base's precision"):
        load_lora(large, {"unet": tiny_components()["unet"].to(torch.float16)})
    alphas = {key.replace("lora_A.weight", "alpha"): torch.tensor(3e38) for key in state if "lora_A" in key}
    with pytest.raises(LoRAError, match="too large for the base's precision"):
        load_lora({**large, **alphas}, models)
    with pytest.raises(MoLEError, match="`scaling` is inf"):
        LoRAFactors(torch.ones(1, 2), torch.ones(2, 1), float("inf"))


def test_models_without_weights_of_their_own_are_not_asked_for_their_size(state: dict[str, Tensor]) -> None:
    assert load_lora(state, {"unet": tiny_components()["unet"].to("meta")}).factors


def test_one_lora_has_one_fingerprint(models: Any, tmp_path: Path) -> None:
    state = random_lora(models, alpha=2.0)
    path = tmp_path / "cat.safetensors"
    save_file(state, path)
    lora = load_lora(path, models)
    save_file(to_kohya(state), tmp_path / "kohya.safetensors", metadata={"ss_output_name": "other"})
    for layout in ("diffusers", "kohya"):
        save_lora(lora, tmp_path / f"{layout}-again.safetensors", layout=layout)  # type: ignore[arg-type]
    others = [load_lora(other, models) for other in tmp_path.glob("*.safetensors")]
    assert len(others) == 4
    assert {other.fingerprint for other in others} == {lora.fingerprint}
    assert len({other.sha256 for other in others}) == 4
    for change in (lambda t: t * 2, lambda t: torch.nextafter(t, t + 1)):
        key = next(iter(state))
        assert load_lora({**state, key: change(state[key])}, models).fingerprint != lora.fingerprint
