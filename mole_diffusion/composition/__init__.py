"""Composition methods: one small file each, and a plain dictionary of their names."""

from __future__ import annotations

from .base import Composition, Step
from .composite import Composite
from .linear import Linear
from .merge import Merge
from .mole import MoLE
from .normalized import Normalized
from .numbers import NumberWeigher
from .switch import Switch

COMPOSITIONS: dict[str, type[Composition]] = {
    method.name: method for method in (Linear, Normalized, Merge, Switch, Composite, MoLE)
}

__all__ = [
    "COMPOSITIONS",
    "Composite",
    "Composition",
    "Linear",
    "Merge",
    "MoLE",
    "Normalized",
    "NumberWeigher",
    "Step",
    "Switch",
]
