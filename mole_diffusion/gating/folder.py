"""A folder of gates, read strictly.

A folder may come from anybody: everything in it is checked before a gate is made of it, so that what loads is what
was saved, or one clear error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mole_diffusion.errors import MoLEError, printable
from mole_diffusion.reading import parse_json, read_text, regular_size
from mole_diffusion.tensor_files import TensorFile, TensorFileError

from .card import CARD, own_card
from .config import LARGEST_LOG_TEMPERATURE, GateConfig
from .identity import GatesError
from .saved_config import CLASS_NAME, check_config
from .spec import GateSpec

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
LARGEST_WEIGHT = 1e10  # a softmax of weights beyond gives NaN or nothing; trained ones are between 0.01 and 100


@dataclass(frozen=True, eq=False)
class SavedGates:
    """What a folder of gates holds, checked.

    Attributes:
        settings: Arguments of `MoLEModel`: `gate_config`, `loras`, `gate_table`.
        tensors: Values of every gate, by key.
        card: The model card, where the folder has one of ours.
    """

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    card: str | None


def is_config(file: Path) -> bool:
    """Whether a file is the `config.json` of gates."""
    try:
        found = parse_json(read_text(file))
    except MoLEError:
        return False
    return isinstance(found, dict) and found.get("_class_name") == CLASS_NAME


def refuse_others(folder: Path) -> None:
    """Raises GatesError where saving gates into a folder would replace the files of another model."""
    there = [file for file in (folder / CONFIG, folder / WEIGHTS) if file.exists()]
    if there and not is_config(folder / CONFIG):
        raise GatesError(
            f"{printable(str(there[0]))} is there and not of gates; it would be replaced. Choose another folder, or "
            "move it away."
        )


def largest_number(key: str) -> float:
    """What a number of gates may be at most, without its sign.

    Args:
        key: The parameter it is in.
    """
    return LARGEST_LOG_TEMPERATURE if key.endswith("log_temperature") else LARGEST_WEIGHT


def key_of(gate: str) -> str:
    """Name of a gate as a submodule, whose names may hold no dots."""
    return gate.replace(".", "/")


def read_gates(
    source: str | os.PathLike[str],
    *,
    subfolder: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> SavedGates:
    """A folder of gates, or one on the Hub: safetensors only, every key in its place, every number finite.

    Raises:
        GatesError: It is no such folder, or holds something else than `save_pretrained` writes.
    """
    folder = Path(source)
    if not os.path.isdir(folder):  # unlike Path's, it takes names that are none
        # What the Hub takes of these settings is what diffusers takes.
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
        folder = _download(
            os.fspath(source), subfolder, force_download=force_download, local_files_only=local_files_only, **hub
        )
    if subfolder:
        folder = folder / subfolder
    try:
        return _read_folder(folder)
    except TensorFileError as error:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        other = f" ({pickles[0]} is a pickle, which is not read)" if pickles and error.problem == "no such file" else ""
        raise GatesError(
            f"{printable(str(folder))}: the gates' weights, {WEIGHTS}: {error.problem}{other}. {error.remedy}"
        ) from None
    except MoLEError as error:
        raise GatesError(f"{printable(str(folder))}: {error}") from None


def _download(source: str, subfolder: str, **settings: Any) -> Path:
    from huggingface_hub import snapshot_download

    if source.startswith((".", "~", "/")) or source.count("/") != 1:
        raise GatesError(f"{printable(source)}: no such folder, and no Hub id such as me/cat-and-boot. Check the path.")
    prefix = f"{subfolder.rstrip('/')}/" if subfolder else ""
    try:
        files = [prefix + name for name in (CONFIG, WEIGHTS, CARD)]
        return Path(snapshot_download(source, allow_patterns=files, **settings))
    except (OSError, ValueError) as error:  # no network, no such repository, no right to it, or no name of one
        raise GatesError(
            f"{printable(source)}: no such folder, and it cannot be had from the Hub: {error} Check the name and the "
            "network."
        ) from None


def _read_folder(folder: Path) -> SavedGates:
    if not os.path.isdir(folder):
        raise MoLEError("no such folder. Check the path.")
    try:
        regular_size(folder / CONFIG)
    except MoLEError as error:
        raise MoLEError(f"{CONFIG}: {error}. Name the folder that `save_gates` wrote.") from None
    try:
        config = parse_json(read_text(folder / CONFIG))
        settings = check_config(config)
    except MoLEError as error:
        raise MoLEError(f"{CONFIG} {str(error).rstrip('.')}. Save the gates again.") from None
    file = TensorFile(folder / WEIGHTS)
    keys = {key: canonical_key(key) for key in file.entries}
    shapes = {keys[key]: entry.shape for key, entry in file.entries.items()}
    _check_shapes(shapes, _expected_shapes(settings))
    if wrong := next((key for key, entry in file.entries.items() if str(entry.dtype) != "torch.float32"), None):
        raise MoLEError(f"{WEIGHTS} has {file.entries[wrong].dtype} where gates have float32: '{printable(wrong)}'.")
    tensors = {keys[key]: tensor for key, tensor in file.tensors.items()}
    for key, tensor in tensors.items():
        largest = largest_number(key)
        if not (tensor.isfinite().all() and tensor.abs().max() <= largest):
            raise MoLEError(
                f"{WEIGHTS} has NaN, infinity or numbers beyond {largest:g}: '{printable(key)}'. Training diverged, "
                "or the file is damaged; train new gates."
            )
    return SavedGates(settings, tensors, own_card(folder))


def canonical_key(key: str) -> str:
    """A key of a weights file whose gate's name does not depend on the version of transformers."""
    return key.replace("/text_model/", "/", 1) if key.startswith("gates.text_encoder") else key


def _expected_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that gates of these settings have, without making them: a config may ask for terabytes."""
    config = GateConfig.from_dict(settings["gate_config"])
    shapes: dict[str, tuple[int, ...]] = {}
    for values in settings["gate_table"]:
        spec = GateSpec.from_dict(values)
        stem, logits = f"gates.{key_of(spec.name)}", len(spec.indices) + config.null_expert
        beside = len(spec.indices) if config.residual else 0
        shapes[f"{stem}.weight"] = (logits, spec.positions, spec.width + beside)
        shapes[f"{stem}.log_temperature"] = ()
        if config.normalization == "layer_norm" and spec.hidden_features != 0:
            shapes[f"{stem}.weight_sum"] = (logits,)
    return shapes


def _check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = {
        "missing keys": sorted(expected.keys() - found.keys()),
        "unexpected keys": sorted(found.keys() - expected.keys()),
        "keys of another shape": sorted(k for k in found.keys() & expected.keys() if found[k] != expected[k]),
    }
    said = [f"{kind} {[printable(key) for key in keys[:3]]}" for kind, keys in problems.items() if keys]
    if said:
        raise MoLEError(
            f"it does not hold the gates its {CONFIG} describes: {'; '.join(said)}. The files do not belong together; "
            "save the gates again."
        )
