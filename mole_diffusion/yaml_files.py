"""YAML as settings are written in it: plain values, strictly, in bounded time and memory."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from mole_diffusion.errors import MoLEError
from mole_diffusion.reading import read_text

# Far beyond any study; a file that goes beyond is none, or was made to do harm.
LARGEST, DEEPEST, MOST_VALUES = 256 * 1024, 20, 5_000
_BOOLEAN = "tag:yaml.org,2002:bool"


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The values of a YAML file; see :func:`parse_yaml`.

    Raises:
        MoLEError: There is no such file, or it is no such YAML. The message names the file.
    """
    text = read_text(path, LARGEST)
    try:
        return parse_yaml(text)
    except MoLEError as error:
        raise MoLEError(f"{Path(path)}: {error}") from None


def parse_yaml(text: str) -> Any:
    """Plain values of a YAML text.

    "off" and "no" stay words, as in YAML 1.2, since settings have them among their values. No key stands twice in a
    mapping; with what anchors repeat written out, there are at most 5,000 values, 20 deep.

    Raises:
        MoLEError: It is no such YAML.
    """
    try:
        _check_depth(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except MoLEError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, AttributeError, KeyError, TypeError) as error:
        # The last six: dates that are none, numbers of a million digits, and whatever else YAML's own types fall over.
        raise MoLEError(f"no YAML that can be read: {error}. Correct it there.") from None


class _Loader(yaml.SafeLoader):
    """Plain values only, and words that YAML 1.1 took for booleans as words."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOLEAN, re.compile("^(?:true|True|false|False)$"), list("tTfF"))


def _check_depth(text: str) -> None:
    """Nesting and number of values, from the parser's events: it keeps no tree, which deep nesting would exhaust."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, _Loader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise MoLEError(f"values are nested more than {DEEPEST} deep.")
        if count > 3 * MOST_VALUES:
            raise MoLEError(f"more than {MOST_VALUES} values.")


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, everything that anchors repeat counted again; checks keys on the way."""
    if id(node) in known:
        if not known[id(node)]:
            raise MoLEError("an anchor that holds itself. Write the values out.")
        return known[id(node)]
    known[id(node)] = 0
    total = 1
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise MoLEError(f"the key in line {key.start_mark.line + 1} is no word. Write it in quotes.")
            if key.value in keys:
                raise MoLEError(f"the key {key.value!r} twice in one mapping, again in line {key.start_mark.line + 1}.")
            keys.add(key.value)
            total += _count(value, known)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count(value, known) for value in node.value)
    if total > MOST_VALUES:
        raise MoLEError(f"more than {MOST_VALUES} values, with what its anchors repeat. Write it without anchors.")
    known[id(node)] = total
    return total
