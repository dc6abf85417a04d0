"""The `loras` argument of `load_loras`: sources and their names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

from torch import Tensor

from ..choices import ROLES, Role
from ..errors import MoLEError
from ..lora import LoRA
from ..reading import is_text

Value = TypeVar("Value")
LoRASource: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor] | LoRA


def named_sources(loras: object) -> dict[str, LoRASource]:
    """Name to source, from a mapping of them or from a list of files, which are named by their stems.

    Raises:
        TypeError: `loras` is neither, a name is no string, or what it names is no LoRA.
        MoLEError: It is empty, or two entries of the list have one name.
    """
    if isinstance(loras, Mapping):
        sources = dict(loras)
    elif isinstance(loras, list | tuple):
        pairs = [(_stem(item), item) for item in loras]
        sources = dict(pairs)
        if len(sources) < len(pairs):
            names = [name for name, _ in pairs]
            raise MoLEError(f"several LoRAs in the list have the same name: {', '.join(names)}. Pass a dict of names.")
    else:
        raise TypeError(
            f'`loras` must be a dict such as {{"cat": "cat.safetensors"}} or a list of files, '
            f"got {loras!r} ({type(loras).__name__})."
        )
    if not sources:
        raise MoLEError(f"there is nothing to load: `loras` is {loras!r}. Taking all off again is `unload_loras()`.")
    for name in sources:
        if not isinstance(name, str) or not name.strip() or not is_text(name):
            raise TypeError(f"a LoRA's name must be a non-empty string, got {name!r} ({type(name).__name__}).")
    for name, source in sources.items():
        if not isinstance(source, str | os.PathLike | Mapping | LoRA):
            raise TypeError(f"the LoRA {name!r} must be a file, a state dict or a LoRA, got a {type(source).__name__}.")
    return sources


def _stem(source: object) -> str:
    """The name of a LoRA in a list: its own, or its file's."""
    if isinstance(source, LoRA):
        return source.name
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"a list of LoRAs holds files, got a {type(source).__name__} in it. Name others in a dict.")
    return Path(source).stem


def choose_triggers(
    given: Mapping[str, str | Sequence[str]] | None, loras: Mapping[str, LoRA]
) -> tuple[dict[str, tuple[str, ...]], frozenset[str]]:
    """The words that call each LoRA: those given, else those its file tells, else its name.

    Returns:
        Name to phrases, and the names that stand in for words nobody told.

    Raises:
        TypeError: `given` is no mapping, or a phrase is no string.
        MoLEError: A name is none of the LoRAs, or has no phrase or an empty one.
    """
    given = _by_name("triggers", given, loras)
    words: dict[str, tuple[str, ...]] = {}
    for name, lora in loras.items():
        phrases = given.get(name, lora.triggers or name)
        phrases = (phrases,) if isinstance(phrases, str) else phrases
        if not isinstance(phrases, list | tuple) or not all(isinstance(phrase, str) for phrase in phrases):
            raise TypeError(f"`triggers` of {name!r} must be a phrase or a list of phrases, got {phrases!r}.")
        if not phrases or not all(phrase.strip() for phrase in phrases):
            raise MoLEError(
                f"`triggers` of {name!r} is {phrases!r}. Give the words that call it, or leave it out: its name "
                "or what its file tells is taken then."
            )
        words[name] = tuple(phrases)
    by_name = frozenset(name for name, lora in loras.items() if name not in given and not lora.triggers)
    return words, by_name


def choose_roles(given: Mapping[str, Role] | None, loras: Mapping[str, LoRA]) -> dict[str, Role]:
    """The role of each LoRA; by default a subject.

    Raises:
        TypeError: `given` is no mapping.
        MoLEError: A name is none of the LoRAs, or a role is unknown.
    """
    given = _by_name("roles", given, loras)
    for name, role in given.items():
        if role not in ROLES:
            raise MoLEError(f"the role of {name!r} is {role!r}; it must be one of {', '.join(map(repr, ROLES))}.")
    return {name: given.get(name, "subject") for name in loras}


def _by_name(argument: str, given: Mapping[str, Value] | None, loras: Mapping[str, LoRA]) -> dict[str, Value]:
    if not isinstance(given, Mapping | None):
        raise TypeError(f"`{argument}` must be a dict of LoRAs' names, got {given!r} ({type(given).__name__}).")
    given = dict(given or {})
    others = [str(name) for name in given if name not in loras]
    if others:
        raise MoLEError(f"`{argument}` has {others[0]!r}, which is none of the LoRAs given: {', '.join(loras)}.")
    return given
