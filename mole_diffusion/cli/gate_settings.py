"""The settings of a gate training, from a preset, a file and the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.errors import MoLEError

from .inputs import read_pairs

if TYPE_CHECKING:
    from mole_diffusion.training import GateTrainingConfig


def read_config(
    preset: str | None, file: Path | None, settings: Sequence[str] | None, options: Mapping[str, Any]
) -> GateTrainingConfig:
    """The settings of a preset, changed by a YAML file, then by --set, then by options such as --steps.

    Raises:
        MoLEError: A setting is unknown or its value is not allowed; the file is missing or no YAML dictionary.
    """
    from mole_diffusion.yaml_files import parse_yaml, read_yaml

    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = read_yaml(file) or {}
        except MoLEError as error:
            raise MoLEError(f"--config {error}") from None
        if not isinstance(values, dict):
            raise MoLEError(f"--config {file} must be a dictionary of settings, got {type(values).__name__}.")
    for key, text in read_pairs("--set", settings or [], "gates.scope=layer").items():
        try:
            value = parse_yaml(text)
        except MoLEError as error:
            raise MoLEError(f"--set {key}={text}: {error}") from None
        if key.startswith("gates."):
            gates = values.get("gates") or {}
            if not isinstance(gates, dict):
                raise MoLEError(f"`gates` must be a dictionary of settings, got {gates!r}.")
            values["gates"] = {**gates, key.removeprefix("gates."): value}
        else:
            values[key] = value
    values |= {name: value for name, value in options.items() if value is not None}
    if preset is not None:
        values["preset"] = preset
    from mole_diffusion.training.gates.config import GateTrainingConfig

    chosen = GateTrainingConfig.from_dict({**values, "warmup_steps": values.get("warmup_steps", 0)})
    if "warmup_steps" in values:
        return chosen
    # Few steps, say for a trial, should not ask for a shorter warm-up too.
    own = GateTrainingConfig.from_dict({"preset": values.get("preset", "default")}).warmup_steps
    return GateTrainingConfig.from_dict({**values, "warmup_steps": min(own, chosen.steps // 4)})
