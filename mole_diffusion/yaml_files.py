"""YAML as settings are written in it: plain values, strictly, in bounded time and memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mole_diffusion.errors import MoLEError
from mole_diffusion.reading import is_text, read_text

# Far beyond any study; a file that goes beyond is none, or was made to do harm.
LARGEST, DEEPEST, MOST_VALUES = 256 * 1024, 20, 5_000
_TAG = "tag:yaml.org,2002:"
PLAIN = ("str", "int", "float", "bool", "null", "seq", "map", "merge")


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The values of a YAML file; see `parse_yaml`.

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

    YAML 1.2: "off" and "no" are words, which settings have among their values, and 1e-5 is a number. No key stands
    twice in a mapping, and there are no dates, sets and bytes. With what anchors repeat written out, there are at most
    5,000 values, 20 deep.

    Raises:
        MoLEError: It is no such YAML.
    """
    try:
        _check_depth(text)
        node = _reader().compose(text)
        if node is None:
            return None
        _count(node, {})
        return _reader().load(text)
    except MoLEError:
        raise
    except (YAMLError, ValueError, ArithmeticError, LookupError, RecursionError, AttributeError, TypeError) as error:
        # All but the first: numbers of a million digits, and whatever else YAML's own types fall over.
        raise MoLEError(f"no YAML that can be read: {error}. Correct it there.") from None


def _reader() -> YAML:
    """Reads one text: plain values only."""
    return YAML(typ="safe", pure=True)


def _check_depth(text: str) -> None:
    """Nesting and number of values, from the parser's events: it keeps no tree, which deep nesting would exhaust."""
    depth = 0
    for count, event in enumerate(_reader().parse(text)):
        if isinstance(event, CollectionStartEvent):
            depth += 1
        elif isinstance(event, CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise MoLEError(f"values are nested more than {DEEPEST} deep.")
        if count > 3 * MOST_VALUES:
            raise MoLEError(f"more than {MOST_VALUES} values.")


def _count(node: Node, known: dict[int, int]) -> int:
    """How many values a node stands for, everything that anchors repeat counted again; checks keys on the way."""
    if id(node) in known:
        if not known[id(node)]:
            raise MoLEError("an anchor that holds itself. Write the values out.")
        return known[id(node)]
    known[id(node)] = 0
    total = 1
    line = node.start_mark.line + 1
    tag = str(node.tag)
    if tag.startswith(_TAG) and tag.removeprefix(_TAG) not in PLAIN:
        raise MoLEError(
            f"a {tag.removeprefix(_TAG)} in line {line}, and there are only words, numbers, lists and mappings. "
            "Write it in quotes."
        )
    if isinstance(node, ScalarNode) and not is_text(node.value):
        raise MoLEError(f"half a UTF-16 pair in line {line}, which is no text.")
    if isinstance(node, MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise MoLEError(f"the key in line {key.start_mark.line + 1} is no word. Write it in quotes.")
            if key.value in keys:
                raise MoLEError(f"the key {key.value!r} twice in one mapping, again in line {key.start_mark.line + 1}.")
            keys.add(key.value)
            _count(key, known)
            total += _count(value, known)
    elif isinstance(node, SequenceNode):
        total += sum(_count(value, known) for value in node.value)
    if total > MOST_VALUES:
        raise MoLEError(f"more than {MOST_VALUES} values, with what its anchors repeat. Write it without anchors.")
    known[id(node)] = total
    return total
