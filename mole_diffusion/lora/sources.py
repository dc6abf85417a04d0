"""Bytes to tensors: safetensors files and folders in, everything else refused with what to do about it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mole_diffusion.lora.errors import LoRAError, refusal

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
FOLDER_WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
STATE_DICT = "<state dict>"


@dataclass(frozen=True, eq=False)
class LoRAFile:
    """Contents of a LoRA file, not yet understood.

    Attributes:
        source: Path as given, or `<state dict>`.
        name: File or folder name without suffix, a default name for the LoRA.
        sha256: Of the file's bytes; of the sorted tensors for a state dict.
        tensors: As stored, by key.
        metadata: Text entries of the safetensors header.
        peft_config: Contents of PEFT's `adapter_config.json` beside the weights, empty where there is none.
    """

    source: str
    name: str
    sha256: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    peft_config: Mapping[str, Any] = field(default_factory=dict)


def read_source(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> LoRAFile:
    """Read a safetensors file, a folder that holds one, or take a state dict.

    Raises:
        LoRAError: If there is no such file, it is a pickle, truncated, not safetensors, or has no tensors.
    """
    file = _from_state_dict(source) if isinstance(source, Mapping) else _from_path(os.fspath(source))
    if not file.tensors:
        raise refusal(file.source, "no tensors in it", "Save the LoRA again; this file holds nothing.")
    return file


def _from_state_dict(tensors: Mapping[str, Tensor]) -> LoRAFile:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        if not isinstance(tensor, Tensor):
            raise refusal(
                STATE_DICT, f"{type(tensor).__name__} where a tensor is expected", "Pass a flat state dict.", keys=[key]
            )
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return LoRAFile(STATE_DICT, "lora", digest.hexdigest(), dict(tensors))


def _from_path(source: str) -> LoRAFile:
    path = _weights_path(source)
    data = path.read_bytes()
    tensors, metadata = _parse(source, data)
    config = path.with_name(PEFT_CONFIG)
    # Beside a file of another name, the config may belong to somebody else.
    peft_config = _read_json(source, config) if path.name == PEFT_WEIGHTS and config.is_file() else {}
    name = Path(source).stem if path == Path(source) else Path(source).name
    return LoRAFile(source, name, hashlib.sha256(data).hexdigest(), tensors, metadata, peft_config)


def _weights_path(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in FOLDER_WEIGHTS if (path / name).is_file()] or sorted(
            path.glob("*.safetensors")
        )
        if len(found) == 1:
            return found[0]
        if found:
            raise refusal(
                source, f"a folder with {len(found)} weight files", "Name one file.", keys=[p.name for p in found]
            )
        raise refusal(source, "a folder without a .safetensors file", "Name the LoRA's file, or its folder.")
    if not path.is_file():
        raise refusal(
            source,
            "no such file",
            "Check the path; a LoRA on the Hub is fetched with `hf download <repository>` first.",
        )
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise _pickle_refusal(source)
    return path


def _parse(source: str, data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not data:
        raise refusal(source, "an empty file", "Download or save it again.")
    if data.startswith(b"version https://git-lfs"):
        raise refusal(source, "a Git LFS pointer, not the weights", "Run `git lfs pull` where it was cloned.")
    header_size = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{":  # asked before the magic bytes: a safetensors file may start with the size 0x0280
        if data.startswith(PICKLE_MAGIC):
            raise _pickle_refusal(source)
        raise refusal(source, "not a safetensors file", "Save the LoRA as safetensors; other formats are not read.")
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + header_size])
    except (SafetensorError, ValueError) as error:
        raise refusal(
            source, f"a truncated or damaged safetensors file ({error})", "Download or save it again."
        ) from error
    return tensors, header.get("__metadata__") or {}


def _read_json(source: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise refusal(source, f"{path.name} is not JSON ({error})", "Save the adapter again.") from error
    if not isinstance(config, dict):
        raise refusal(source, f"{path.name} is not a JSON object", "Save the adapter again.")
    return config


def _pickle_refusal(source: str) -> LoRAError:
    return refusal(
        source,
        "a pickle, which can run any code when opened, or another archive",
        "Convert it where you trust it: `safetensors.torch.save_file("
        "torch.load(path, map_location='cpu', weights_only=True), 'lora.safetensors')`.",
    )
