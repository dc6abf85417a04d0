"""Composition methods: one small file each, and a dictionary of their names."""

from __future__ import annotations

from importlib import import_module

from ..choices import Role
from ..methods import METHODS
from .base import Composition
from .budget import Budget
from .call import Call
from .composite import Composite
from .freefuse import FreeFuse
from .linear import Linear
from .masked_gates import MaskedGates
from .masks import Masks
from .merge import Merge
from .mole import MoLE
from .norm_router import NormRouter
from .normalized import Normalized
from .regional import RegionalComposition
from .regions import RegionMap
from .step import Step
from .steps import StepComposition
from .switch import Switch


def _defined_in(module: str) -> type[Composition]:
    """The method whose file has its name.

    Raises:
        ImportError: The file defines no method of that name.
    """
    for defined in vars(import_module(f"{__name__}.{module}")).values():
        is_method = isinstance(defined, type) and issubclass(defined, Composition)
        if is_method and vars(defined).get("name") == module:
            return defined
    raise ImportError(f"composition/{module}.py defines no Composition with name = {module!r}.")


COMPOSITIONS: dict[str, type[Composition]] = {name: _defined_in(name) for name in METHODS}

__all__ = [
    "COMPOSITIONS",
    "Budget",
    "Call",
    "Composite",
    "Composition",
    "FreeFuse",
    "Linear",
    "MaskedGates",
    "Masks",
    "Merge",
    "MoLE",
    "NormRouter",
    "Normalized",
    "RegionMap",
    "RegionalComposition",
    "Role",
    "Step",
    "StepComposition",
    "Switch",
]
