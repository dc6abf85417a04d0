"""Composition methods: one small file each, and a plain dictionary of their names."""

from __future__ import annotations

from ..choices import Role
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

COMPOSITIONS: dict[str, type[Composition]] = {
    method.name: method
    for method in (Linear, Normalized, Budget, Merge, Switch, Composite, Masks, FreeFuse, NormRouter, MoLE, MaskedGates)
}

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
