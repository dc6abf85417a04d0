"""Folders of gates: written, read strictly, and tied to the LoRAs they weigh.

A folder may come from anybody: everything in it is checked before a gate is made of it, so that what loads is what
was saved, or one clear error.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mole_diffusion.errors import MoLEError, printable
from mole_diffusion.reading import parse_json, read_text, regular_size
from mole_diffusion.tensor_files import TensorFile, TensorFileError

from ..lora import LoRA
from .config import GateConfig
from .spec import GateSpec, canonical_place

CONFIG, WEIGHTS, CARD = "config.json", "diffusion_pytorch_model.safetensors", "README.md"
LIBRARY = "library_name: mole_diffusion"
# A softmax of weights or temperatures beyond these gives NaN or nothing; trained ones are between 0.01 and 100.
LARGEST_WEIGHT, LARGEST_LOG_TEMPERATURE = 1e10, 20.0

_WITH_HIDDEN = {"input": "experts", "gate_sum": 1.0, "null_expert": False}
_WITH_RESIDUAL = {"residual": False}


class GatesError(MoLEError):
    """Gates that cannot be used as they are: a damaged folder, or LoRAs they were not trained with."""


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


def key_of(gate: str) -> str:
    """Name of a gate as a submodule, whose names may hold no dots."""
    return gate.replace(".", "/")


def fingerprint(lora: LoRA) -> dict[str, Any]:
    """What gates remember of a LoRA: its name, the hash of its factors, its ranks."""
    return {"name": lora.name, "sha256": lora.fingerprint, "ranks": list(lora.ranks)}


def check_loras(expected: Sequence[Mapping[str, Any]], loras: Sequence[LoRA]) -> None:
    """Check that these are the LoRAs that gates were made for, in their order.

    Raises:
        GatesError: Naming every difference in number, names, order, ranks and factors.
    """
    known, names = [lora["name"] for lora in expected], [lora.name for lora in loras]
    if names != known:
        order = " in this order" if sorted(names) == sorted(known) else ""
        raise GatesError(
            f"These gates were trained for the LoRAs {known}{order}, got {names}. Load those{order}, or train new "
            "gates."
        )
    problems = []
    for want, lora in zip(expected, loras, strict=True):
        if list(want["ranks"]) != list(lora.ranks):
            problems.append(f"{lora.name!r} has ranks {list(lora.ranks)} and not {list(want['ranks'])}")
        # Folders of earlier versions have the hash of the file, with which nothing else has the same.
        if want["sha256"] not in (lora.fingerprint, lora.sha256):
            problems.append(
                f"{lora.name!r} has factors of SHA-256 {lora.fingerprint[:12]}… and not {want['sha256'][:12]}…"
            )
    if problems:
        raise GatesError(
            f"These gates were trained for other LoRAs: {'; '.join(problems)}. Load the ones they were trained with, "
            "in whatever file, or train new gates."
        )


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
    if not folder.is_dir():
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


def card_of(loras: Sequence[Mapping[str, Any]], config: GateConfig) -> str:
    """A model card for gates that have none of their own yet."""
    names = [printable(lora["name"]) for lora in loras]
    return "\n".join(
        [
            "---",
            LIBRARY,
            "tags: [lora, mixture-of-lora-experts]",
            "---",
            "",
            f"# Gates for {' + '.join(names)}",
            "",
            "Gates of [Mixture of LoRA Experts](https://openreview.net/forum?id=uWvKBCYh4S) for `mole_diffusion`. "
            "They weigh exactly these LoRAs, in this order:",
            "",
            *(
                f"- {name}: ranks {lora['ranks'][0]} to {lora['ranks'][1]}, factors of SHA-256 {lora['sha256']}"
                for name, lora in zip(names, loras, strict=True)
            ),
            "",
            "```python",
            f"pipe.load_loras({{{', '.join(f'{name!r}: ...' for name in names)}}})",
            "pipe.load_gates(folder)",
            "```",
            "",
            "Settings: " + ", ".join(f"`{name}={value}`" for name, value in config.to_dict().items()) + ".",
            "",
        ]
    )


def own_card(folder: Path) -> str | None:
    """The model card of a folder, if it is one of this library's."""
    try:
        text = read_text(folder / CARD)
    except MoLEError:
        return None
    return text if LIBRARY in text.splitlines()[:20] else None


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
    if not folder.is_dir():
        raise MoLEError("no such folder. Check the path.")
    try:
        regular_size(folder / CONFIG)
    except MoLEError as error:
        raise MoLEError(f"{CONFIG}: {error}. Name the folder that `save_gates` wrote.") from None
    try:
        config = parse_json(read_text(folder / CONFIG))
        settings = _check_config(config)
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
        largest = LARGEST_LOG_TEMPERATURE if key.endswith("log_temperature") else LARGEST_WEIGHT
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
        stem, logits = f"gates.{key_of(spec.name)}", len(spec.experts) + config.null_expert
        beside = len(spec.experts) if config.residual else 0
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


def _check_config(config: Any) -> dict[str, Any]:
    """The arguments of `MoLEModel` in a config; every one is checked, since a default would be another picture."""
    _need(isinstance(config, dict), "is not a JSON object")
    _need(config.get("_class_name") == "MoLEModel", "is not of gates: its _class_name is not MoLEModel")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    _need_keys(settings, ("gate_config", "loras", "gate_table"), "")
    settings = _with_later_settings(settings)
    fields = [field.name for field in dataclasses.fields(GateConfig)]
    _need_keys(settings["gate_config"], fields, "gate_config")
    gates = GateConfig.from_dict(settings["gate_config"])
    loras = _rows(settings["loras"], ("name", "sha256", "ranks"), "loras")
    for lora in loras:
        _need(_is_text(lora["name"]), "has a LoRA in loras whose name is no text")
        digest = lora["sha256"]
        _need(
            isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef"),
            "has a LoRA in loras whose sha256 is none",
        )
        _need(_are_numbers(lora["ranks"], 1) and len(lora["ranks"]) == 2, "has a LoRA in loras whose ranks are none")
    names = [lora["name"] for lora in loras]
    _need(len(set(names)) == len(names), "has two LoRAs of one name in loras")
    table = _rows(settings["gate_table"], [field.name for field in dataclasses.fields(GateSpec)], "gate_table")
    for spec in table:
        _check_spec(spec, gates, len(loras))
    places = [canonical_place(spec["component"], spec["name"]) for spec in table]
    _need(len(set(places)) == len(places), "has two gates of one name in gate_table")
    return settings


def _with_later_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of gates that were saved before there were these, with what they were then."""
    config, table = settings["gate_config"], settings["gate_table"]
    if not isinstance(config, dict):
        return settings
    rows = table if isinstance(table, list) else []
    # Those of one version came together: a folder has all of them or none.
    if not config.keys() & _WITH_HIDDEN.keys() and all(
        isinstance(row, dict) and "hidden_features" not in row for row in rows
    ):
        config = {**config, **_WITH_HIDDEN}
        table = [{**row, "hidden_features": None} for row in rows]
    return {**settings, "gate_config": {**_WITH_RESIDUAL, **config}, "gate_table": table}


def _check_spec(spec: Mapping[str, Any], config: GateConfig, num_loras: int) -> None:
    where = "has a gate in gate_table"
    _need(_is_text(spec["name"]) and _is_text(spec["component"]), f"{where} without a name or component")
    place = f"has a gate {printable(spec['name'])} in gate_table"
    experts, modules = spec["experts"], spec["modules"]
    _need(
        _are_numbers(experts, 0) and experts == sorted(set(experts)) and len(experts) > 0 and experts[-1] < num_loras,
        f"{place} whose experts are no indices of its LoRAs",
    )
    _need(
        isinstance(modules, list) and len(modules) > 0 and all(_is_text(module) for module in modules),
        f"{place} whose modules are no names",
    )
    for entry in _rows(spec["entries"], ("module", "ranks", "features"), "entries"):
        _need(entry["module"] in modules, f"{place} that reads a module it does not weigh")
        _need(_are_numbers(entry["ranks"], 0) and len(entry["ranks"]) == num_loras, f"{place} whose ranks are none")
        _need(_is_number(entry["features"], 1), f"{place} whose features are no number")
    block, hidden = spec["block"], spec["hidden_features"]
    _need(_is_text(block) if config.experts == "block" else block is None, f"{place} with another block than its kind")
    reads = {"experts": hidden is None, "hidden": _is_number(hidden, 1), "none": hidden == 0 and _is_number(hidden, 0)}
    _need(reads[config.input], f"{place} whose hidden_features do not go with input={config.input!r}")
    _need(isinstance(spec["spatial"], bool), f"{place} whose `spatial` is not true or false")
    _need(_is_number(spec["positions"], 1), f"{place} whose positions are no number")


def _rows(value: Any, keys: Sequence[str], what: str) -> list[dict[str, Any]]:
    _need(isinstance(value, list) and len(value) > 0, f"has {what} that are no list")
    for row in value:
        _need_keys(row, keys, what)
    return list(value)


def _need_keys(value: Any, keys: Sequence[str], what: str) -> None:
    place = f" in {what}" if what else ""
    _need(isinstance(value, dict), f"has something else than an object{place or ' at its top'}")
    missing, unknown = sorted(set(keys) - set(value)), sorted(set(value) - set(keys))
    _need(not missing, f"lacks {', '.join(missing)}{place}")
    _need(not unknown, f"has unknown keys {[printable(key, 60) for key in unknown[:3]]}{place}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 500


def _is_number(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _are_numbers(value: Any, least: int) -> bool:
    return isinstance(value, list) and all(_is_number(entry, least) for entry in value)


def _need(condition: bool, problem: str) -> None:
    if not condition:
        raise MoLEError(problem)
