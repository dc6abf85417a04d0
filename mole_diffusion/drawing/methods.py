"""Composition methods by name with their options, as a page or a command line gives them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..choices import check_method
from ..composition import COMPOSITIONS, Composition
from ..errors import MoLEError, printable


def options(name: str) -> dict[str, Any]:
    """The options of a method that are plain values, with their defaults.

    Raises:
        MoLEError: There is no such method.
    """
    check_method(name, COMPOSITIONS)
    parameters = inspect.signature(COMPOSITIONS[name].__init__).parameters.values()
    return {p.name: p.default for p in parameters if _plain(p.default) and not (p.default is None and _made(p))}


def method(name: str, given: Mapping[str, Any] | None = None) -> Composition:
    """A method with the options given.

    Raises:
        MoLEError: There is no such method or option, or its value is not allowed.
    """
    known = options(name)
    for key, value in (given or {}).items():
        if key not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise MoLEError(f"composition {name!r} has no option {key!r}; {there}.")
        kinds = (int, float, type(None)) if known[key] is None else (int, float) if known[key] is not True else (bool,)
        if isinstance(known[key], bool) != isinstance(value, bool) or not isinstance(value, kinds):
            raise MoLEError(
                f"the option {key} of {name!r} must be {_kind(known[key])}, got {printable(repr(value), 80)}."
            )
        if isinstance(known[key], int) and not isinstance(value, int):
            raise MoLEError(f"the option {key} of {name!r} must be a whole number, got {value}.")
    return COMPOSITIONS[name](**dict(given or {}))


def _plain(default: Any) -> bool:
    return default is None or isinstance(default, bool | int | float)


def _made(parameter: inspect.Parameter) -> bool:
    """Whether an option takes something to be made in Python, such as another method or gates."""
    return not any(kind in str(parameter.annotation) for kind in ("float", "int", "bool"))


def _kind(default: Any) -> str:
    return "true or false" if isinstance(default, bool) else "a number"
