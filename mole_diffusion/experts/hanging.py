"""Whether modules still hang where they hung."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any


class Hanging:
    """What hung in some places of a model when this was made.

    It is looked at again in every pass, at a hundred places and more: so without a line of Python for each.

    Args:
        places: The `_modules` of a module, and a name in it.
    """

    def __init__(self, places: Iterable[tuple[dict[str, Any], str]]) -> None:
        given = list(places)
        self._modules = [modules for modules, _ in given]
        self._names = [name for _, name in given]
        self._found = list(self._now())

    def unchanged(self) -> bool:
        """Whether the very same modules hang there now."""
        return all(map(is_, self._now(), self._found))

    def _now(self) -> Iterable[Any]:
        return map(dict.get, self._modules, self._names)
