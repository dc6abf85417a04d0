"""What a CLIP may be called: a folder, or an architecture and weights of open_clip. Known before torch is imported."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from mole_diffusion.errors import MoLEError
from mole_diffusion.extras import needs

WEIGHTS = "open_clip_model.safetensors"
_LOCAL = "local-dir:"


class _Lists(NamedTuple):
    """What open_clip knows.

    Attributes:
        architectures: Their names.
        weights: The names of those there are for an architecture.
    """

    architectures: Collection[str]
    weights: Callable[[str], list[str]]


def open_clip_name(name: str, pretrained: str | None) -> str:
    """What open_clip calls a model.

    Args:
        name: A folder, or the name of an architecture.
        pretrained: Which weights, of an architecture.

    Raises:
        MoLEError: It is neither, or open_clip would go on with random weights.
    """
    folder = Path(name.removeprefix(_LOCAL))
    if name.startswith(_LOCAL) or os.path.isdir(folder):
        missing = [file for file in ("open_clip_config.json", WEIGHTS) if not (folder / file).is_file()]
        if missing:
            raise MoLEError(f"{folder} is no folder of an open_clip model: it lacks {' and '.join(missing)}.")
        if pretrained is not None:
            raise MoLEError(
                f"`pretrained` is {pretrained!r}, but the folder {folder} has its own weights. Leave it out."
            )
        return f"{_LOCAL}{folder}"
    known = _lists()
    if name not in known.architectures:
        raise MoLEError(
            f"{name!r} is neither a folder nor an open_clip architecture. `open_clip.list_models()` lists those, "
            'for instance "ViT-B-32".'
        )
    tags = known.weights(name)
    if pretrained is None or (pretrained not in tags and not Path(pretrained).is_file()):
        raise MoLEError(
            f"`pretrained` is {pretrained!r}; {name} without pretrained weights scores at random. "
            f"Choose one of {', '.join(tags) or 'no known tags: give a file'}."
        )
    if pretrained not in tags and Path(pretrained).suffix != ".safetensors":
        raise MoLEError(f"`pretrained` is {pretrained!r}; weights are read from .safetensors only. Save them so.")
    return name


def _lists() -> _Lists:
    """From open_clip, which may know more by now; before torch is imported from its files, which takes no seconds."""
    with needs("train", "CLIP"):
        there = "open_clip" in sys.modules or "torch" in sys.modules
        found: Any = importlib.import_module("open_clip") if there else importlib.util.find_spec("open_clip")
        if found is None:
            raise ModuleNotFoundError("open_clip", name="open_clip")
    if there:
        return _Lists(found.list_models(), found.list_pretrained_tags_by_model)
    folders = [Path(folder) for folder in found.submodule_search_locations]
    architectures = {file.stem for folder in folders for file in folder.glob("model_configs/*.json")}

    def weights(architecture: str) -> list[str]:
        # Its list of weights stands in a file that imports torch only to read some, where safetensors has that.
        alone = ModuleType("_open_clip_lists")
        alone.__path__ = [str(folder) for folder in folders]
        hidden = {"safetensors.torch": None, alone.__name__: alone}
        before = {name: sys.modules.get(name) for name in hidden}
        sys.modules.update(hidden)  # type: ignore[arg-type]
        try:
            listed = importlib.import_module(f"{alone.__name__}.pretrained")
        finally:
            for name, module in before.items():
                if module is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module
        tags: list[str] = listed.list_pretrained_tags_by_model(architecture)
        return tags

    return _Lists(architectures, weights)
