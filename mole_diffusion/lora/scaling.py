"""How strongly a pair acts: `alpha / r`, wherever a file keeps its alpha."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mole_diffusion.lora.errors import refusal
from mole_diffusion.lora.pairs import Pair
from mole_diffusion.lora.sources import LoRAFile

DIFFUSERS_METADATA = "lora_adapter_metadata"


def adapter_configs(file: LoRAFile) -> dict[str | None, dict[str, Any]]:
    """PEFT configs that travel with a file, by component; the key None is one for whatever the file holds.

    They come from PEFT's `adapter_config.json`, or from the JSON text diffusers writes into the safetensors header,
    whose names are `unet.r`, `unet.lora_alpha`, `text_encoder.r` and so on.

    Raises:
        LoRAError: If the text is not a JSON object, or describes another kind of adapter than LoRA.
    """
    if file.peft_config:
        configs: dict[str | None, dict[str, Any]] = {None: dict(file.peft_config)}
    else:
        configs = {}
        for name, value in _header_json(file).items():
            owner, dot, setting = name.partition(".")
            configs.setdefault(owner if dot else None, {})[setting if dot else name] = value
    for config in configs.values():
        kind = "DoRA" if config.get("use_dora") else str(config.get("peft_type") or "LORA")
        if kind != "LORA":
            raise refusal(file.source, f"its config says {kind}", "Only plain LoRA is read; train or convert one.")
        for name in ("rank_pattern", "alpha_pattern"):
            if not _is_pattern(config.get(name) or {}):
                raise refusal(file.source, f"{name} in its config is no table of regular expressions", "Correct it.")
    return configs


def scaling(file: LoRAFile, layout: str, pair: Pair, names: Sequence[str], config: Mapping[str, Any]) -> float:
    """`alpha / r` of a pair; `alpha / sqrt(r)` where the config says rsLoRA; 1.0 where no alpha is known.

    Args:
        file: It comes from, for messages.
        layout: Of the file, for messages.
        pair: An alpha of its own goes before the config's.
        names: Spellings of the module, matched against the config's patterns as PEFT does.
        config: PEFT config for the pair's component; empty where there is none.

    Raises:
        LoRAError: If the config's rank is not the pair's, so that it belongs to another file.
    """
    expected = _by_pattern(config.get("rank_pattern"), names, config.get("r"))
    if expected is not None and expected != pair.r:
        raise refusal(
            file.source,
            f"its config says rank {expected}, the factors have rank {pair.r}",
            "Put the config that was saved with these weights beside them.",
            layout=layout,
            components=[pair.component] if pair.component else [],
            keys=[pair.key],
        )
    alpha = pair.alpha
    if alpha is None:
        alpha = _by_pattern(config.get("alpha_pattern"), names, config.get("lora_alpha"))
    if alpha is None:
        return 1.0
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise refusal(
            file.source,
            f"alpha {alpha!r} is not a finite number",
            "Correct the config.",
            layout=layout,
            keys=[pair.key],
        )
    return alpha / (math.sqrt(pair.r) if config.get("use_rslora") else pair.r)


def _header_json(file: LoRAFile) -> dict[str, Any]:
    text = file.metadata.get(DIFFUSERS_METADATA)
    if not text:
        return {}
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise refusal(file.source, f"header entry {DIFFUSERS_METADATA!r} is not a JSON object", "Save the LoRA again.")
    return settings


def _is_pattern(patterns: Any) -> bool:
    try:
        return isinstance(patterns, dict) and all(re.compile(pattern) for pattern in patterns)
    except re.error:
        return False


def _by_pattern(patterns: Mapping[str, Any] | None, names: Sequence[str], default: Any) -> Any:
    """The value of the first pattern that ends one of the names, else `default`: PEFT's rule."""
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            return value
    return default
