"""The `config.json` of gates, checked entry by entry: a default in the place of one would draw another picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mole_diffusion.errors import MoLEError, printable

from .config import GateConfig
from .spec import GateSpec, canonical_place

CLASS_NAME = "MoLEModel"  # as diffusers writes it, of the class that is saved
# Settings that came later, with what gates did before there were these.
_WITH_HIDDEN = {"input": "experts", "gate_sum": 1.0, "null_expert": False}
_WITH_RESIDUAL = {"residual": False}


def check_config(config: Any) -> dict[str, Any]:
    """The arguments of `MoLEModel` in a config; every one is checked, since a default would be another picture."""
    _need(isinstance(config, dict), "is not a JSON object")
    _need(config.get("_class_name") == CLASS_NAME, f"is not of gates: its _class_name is not {CLASS_NAME}")
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
    """Settings of gates that were saved before there were these, with what they were then, by today's names."""
    config, table = settings["gate_config"], settings["gate_table"]
    if not isinstance(config, dict):
        return settings
    rows = [_renamed(row) for row in table] if isinstance(table, list) else []
    # Those of one version came together: a folder has all of them or none.
    if not config.keys() & _WITH_HIDDEN.keys() and all(
        isinstance(row, dict) and "hidden_features" not in row for row in rows
    ):
        config = {**config, **_WITH_HIDDEN}
        rows = [{**row, "hidden_features": None} for row in rows]
    table = rows if isinstance(table, list) else table
    return {**settings, "gate_config": {**_WITH_RESIDUAL, **config}, "gate_table": table}


def _renamed(row: Any) -> Any:
    """A gate whose `indices` were called `experts`."""
    if not isinstance(row, dict) or "experts" not in row or "indices" in row:
        return row
    return {"indices" if key == "experts" else key: value for key, value in row.items()}


def _check_spec(spec: Mapping[str, Any], config: GateConfig, num_loras: int) -> None:
    where = "has a gate in gate_table"
    _need(_is_text(spec["name"]) and _is_text(spec["component"]), f"{where} without a name or component")
    place = f"has a gate {printable(spec['name'])} in gate_table"
    indices, modules = spec["indices"], spec["modules"]
    _need(
        _are_numbers(indices, 0) and indices == sorted(set(indices)) and len(indices) > 0 and indices[-1] < num_loras,
        f"{place} whose indices are not those of its LoRAs",
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
