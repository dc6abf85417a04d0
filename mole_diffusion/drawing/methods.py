"""Composition methods by name with their options, as a page or a command line gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..composition import COMPOSITIONS, Composition
from ..methods import check_options


def method(name: str, given: Mapping[str, Any] | None = None) -> Composition:
    """A method with the options given.

    Raises:
        MoLEError: There is no such method or option, or its value is not allowed.
    """
    check_options(name, given or {})
    return COMPOSITIONS[name](**dict(given or {}))
