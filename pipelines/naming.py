"""The `loras` argument of `load_loras`: sources and their names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from ..lora import LoRA

LoRASource: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor] | LoRA


def named_sources(loras: object) -> dict[str, LoRASource]:
    """Name to source, from a mapping of them or from a list of files, which are named by their stems.

    Raises:
        TypeError: `loras` is neither, or a name is no string.
        ValueError: It is empty, or two entries of the list have one name.
    """
    if isinstance(loras, Mapping):
        sources = dict(loras)
    elif isinstance(loras, list | tuple):
        pairs = [(item.name if isinstance(item, LoRA) else Path(item).stem, item) for item in loras]
        sources = dict(pairs)
        if len(sources) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"several LoRAs in the list have the same name: {', '.join(names)}. Pass a dict of names.")
    else:
        raise TypeError(
            f'`loras` must be a dict such as {{"cat": "cat.safetensors"}} or a list of files, '
            f"got {loras!r} ({type(loras).__name__})."
        )
    if not sources:
        raise ValueError(f"there is nothing to load: `loras` is {loras!r}. Taking all off again is `unload_loras()`.")
    for name in sources:
        if not isinstance(name, str) or not name:
            raise TypeError(f"a LoRA's name must be a non-empty string, got {name!r} ({type(name).__name__}).")
    return sources
