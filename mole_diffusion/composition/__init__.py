"""Composition methods: one small file each, and a plain dictionary of their names."""

from __future__ import annotations

from .base import Composition, Step
from .linear import Linear
from .mole import MoLE
from .normalized import Normalized
from .numbers import NumberWeigher

COMPOSITIONS: dict[str, type[Composition]] = {method.name: method for method in (Linear, Normalized, MoLE)}

__all__ = ["COMPOSITIONS", "Composition", "Linear", "MoLE", "Normalized", "NumberWeigher", "Step"]
