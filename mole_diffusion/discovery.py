"""What the files of a folder define, so that a new layout, kind or family is one file and stands in no list."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any


def modules_in(package: str) -> list[ModuleType]:
    """The modules of a package, by name.

    Args:
        package: Its full name; it may be the one that is being imported, as far as its modules need nothing of it.
    """
    names = sorted(found.name for found in pkgutil.iter_modules(importlib.import_module(package).__path__))
    return [importlib.import_module(f"{package}.{name}") for name in names]


def one_of_each(package: str, base: type) -> list[Any]:
    """An instance of every class that the modules of a package define as a subclass of `base`.

    Args:
        package: The package's full name.
        base: What the classes have in common; they take no arguments.

    Returns:
        In the order of the modules' names, and of the classes in each.
    """
    return [
        defined()
        for module in modules_in(package)
        for defined in vars(module).values()
        if isinstance(defined, type)
        and issubclass(defined, base)
        and defined is not base
        and defined.__module__ == module.__name__
    ]
