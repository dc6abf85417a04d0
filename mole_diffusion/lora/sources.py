"""From a path to what lies there: the file a user means, its header, and the config beside it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.errors import MoLEError
from mole_diffusion.families import COMPONENTS
from mole_diffusion.lora.errors import LoRAError, refusal
from mole_diffusion.reading import parse_json, read_text, regular_size
from mole_diffusion.tensor_files import PICKLE_SUFFIXES, TensorEntry, TensorFile, TensorFileError

FOLDER_WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
STATE_DICT = "<state dict>"
Config = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class LoRAFile:
    """A LoRA file, not yet understood. Its header is read; its tensors are when somebody asks for them.

    Attributes:
        source: Path as given, or `<state dict>`.
        name: File or folder name without suffix, a default name for the LoRA.
        entries: Kind and shape of every tensor, by key.
        read: Reads the tensors as stored, by key, and a SHA-256: of the file's bytes; of the sorted tensors for a
            state dict.
        metadata: Text entries of the safetensors header.
        peft_config: Contents of PEFT's `adapter_config.json` beside the weights or in the header; empty without one.
        config_may_be_others: Whether the config lies beside a file of another name than PEFT's.
    """

    source: str
    name: str
    entries: Mapping[str, TensorEntry]
    read: Callable[[], tuple[Mapping[str, Tensor], str]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    peft_config: Config = field(default_factory=dict)
    config_may_be_others: bool = False

    @cached_property
    def _contents(self) -> tuple[Mapping[str, Tensor], str]:
        try:
            return self.read()
        except TensorFileError as error:
            raise refusal(self.source, error.problem, error.remedy) from None

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors as stored."""
        return self._contents[0]

    @property
    def sha256(self) -> str:
        """As `read` gives it."""
        return self._contents[1]


def read_source(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> LoRAFile:
    """The header of a safetensors file, or of one in a folder; or a state dict.

    Raises:
        LoRAError: There is no such file, it is a pickle, truncated, not safetensors, or has no tensors.
    """
    file = _from_state_dict(source) if isinstance(source, Mapping) else _from_path(os.fspath(source))
    if not file.entries:
        raise refusal(file.source, "no tensors in it", "Save the LoRA again; this file holds nothing.")
    return file


def _from_state_dict(given: Mapping[str, Tensor]) -> LoRAFile:
    for key, tensor in given.items():
        problem = None
        if not isinstance(key, str):
            problem = f"a key that is a {type(key).__name__}"
        elif not isinstance(tensor, Tensor):
            problem = f"{type(tensor).__name__} where a tensor is expected"
        elif tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            problem = "a tensor without plain values (sparse, quantised or on the meta device)"
        if problem:
            raise refusal(STATE_DICT, problem, "Pass a flat state dict.", keys=[str(key)])
    tensors = dict(given)

    def read() -> tuple[Mapping[str, Tensor], str]:
        digest = hashlib.sha256()
        for key in sorted(tensors):
            tensor = tensors[key].detach()
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode("utf-8", "surrogatepass"))
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return tensors, digest.hexdigest()

    entries = {key: TensorEntry(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    return LoRAFile(STATE_DICT, "lora", entries, read)


def _from_path(source: str) -> LoRAFile:
    path = Path(source)
    weights = _one_weights_file(source)
    try:
        file = TensorFile(weights)
    except TensorFileError as error:
        raise _file_refusal(source, weights, error) from None
    name = path.stem if weights == path else path.resolve().name
    own = weights.name == PEFT_WEIGHTS
    config: Config = {}
    # Beside a file of another name a config may belong to somebody else, unless there is nobody else.
    if own or len(_weights_in(weights.parent)) == 1:
        config = _read_config(source, weights.with_name(PEFT_CONFIG))
    if not config and PEFT_CONFIG in file.metadata:
        own, config = True, _parse_config(source, f"header entry {PEFT_CONFIG!r}", file.metadata[PEFT_CONFIG])
    return LoRAFile(
        source,
        name,
        file.entries,
        lambda: (file.tensors, file.sha256),
        file.metadata,
        config,
        not own,
    )


def _weights_in(folder: Path, suffixes: tuple[str, ...] = (".safetensors",)) -> list[Path]:
    """The files of a folder that may hold a LoRA; those with a dot in front are other programs' leftovers."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    return sorted(path for path in found if not path.is_dir())


def _one_weights_file(source: str) -> Path:
    path = Path(source)
    if not os.path.isdir(path):  # unlike Path's, it takes names that are none
        return path
    try:
        files = _weights_in(path)
        pickles = _weights_in(path, PICKLE_SUFFIXES)
    except OSError as error:
        raise refusal(source, f"cannot be opened ({error.strerror or error})", "Check the path.") from None
    found = [file for file in files if file.name in FOLDER_WEIGHTS] or files
    if len(found) == 1:
        return found[0]
    if found:
        raise refusal(
            source, f"a folder with {len(found)} weight files", "Name one file.", keys=[file.name for file in found]
        )
    if pickles:
        raise _pickle_refusal(source, pickles[0])
    if (path / "model_index.json").is_file():
        raise refusal(source, "a whole model, which is no LoRA", "Name the file of a LoRA for it.")
    if parts := [name for name in COMPONENTS if (path / name).is_dir()]:
        raise refusal(
            source,
            f"a folder of adapters for {' and '.join(parts)}",
            "Load each under a name of its own, and compose them with `set_composition('linear')`.",
            keys=[str(path / name) for name in parts],
        )
    raise refusal(source, "a folder without a .safetensors file", "Name the LoRA's file, or its folder.")


def _read_config(source: str, path: Path) -> Config:
    """PEFT's `adapter_config.json`, empty where there is none."""
    try:
        regular_size(path)
    except MoLEError as error:
        if str(error) == "no such file":
            return {}
        raise refusal(source, f"{path.name} is {error}", "Save the adapter again.") from None
    try:
        text = read_text(path)
    except MoLEError as error:
        raise refusal(source, f"the config beside it, {error}", "Save the adapter again.") from None
    return _parse_config(source, path.name, text)


def _parse_config(source: str, what: str, text: str) -> Config:
    try:
        config = parse_json(text)
    except MoLEError as error:
        raise refusal(source, f"{what} {error}", "Save the adapter again.") from None
    if not isinstance(config, dict):
        raise refusal(source, f"{what} is not a JSON object", "Save the adapter again.")
    return config


def _file_refusal(source: str, path: Path, error: TensorFileError) -> LoRAError:
    if error.pickle:
        return _pickle_refusal(source, path)
    if error.problem == "no such file":
        remedy = "Check the path; a LoRA on the Hub is fetched with `hf download <repository>` first."
        return refusal(source, error.problem, remedy)
    return refusal(source, error.problem, error.remedy)


def _pickle_refusal(source: str, path: Path) -> LoRAError:
    """A remedy that keeps the meaning: what PEFT writes beside its pickle goes into the header of the new file."""
    config = path.with_name(PEFT_CONFIG)
    where, header = "", ""
    if config.is_file():
        where, header = " in its folder", f", {{'{PEFT_CONFIG}': pathlib.Path('{PEFT_CONFIG}').read_text('utf-8')}}"
    name = "" if str(path) == source else f" ({path.name})"
    return refusal(
        source,
        f"a pickle{name}, which can run any code when opened, or another archive",
        f"Convert it where you trust it{where}: `safetensors.torch.save_file("
        f"torch.load(path, map_location='cpu', weights_only=True), 'lora.safetensors'{header})`.",
    )
