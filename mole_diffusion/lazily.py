"""Packages that hand out their names on first use: what is quick to say does not wait for torch."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from .extras import Extra, needs


def on_first_use(
    package: str, extra: Extra | None = None, what: str = ""
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose `__init__.py` imports its names under `if TYPE_CHECKING:` alone.

    Args:
        package: Its `__name__`.
        extra: Which extra of the package brings what these names need, if one does.
        what: What needs it, as in `needs`.
    """
    module = sys.modules[package]
    homes = _imported_for_types(module)

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(homes))}")
        home = homes[name]
        with nullcontext() if extra is None else needs(extra, what):
            found = importlib.import_module(home or f".{name}", package)
        value = getattr(found, name) if home else found
        setattr(module, name, value)
        return value

    return find, lambda: sorted({*vars(module), *homes})


def _imported_for_types(module: Any) -> dict[str, str]:
    """Name to the module that has it, as `from .home import name` says it; "" where the name is a module itself."""
    source = module.__spec__.loader.get_source(module.__name__)
    return {
        alias.asname or alias.name: "." * line.level + line.module if line.module else ""
        for block in ast.parse(source).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for line in block.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
