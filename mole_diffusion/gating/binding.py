"""What ties gates to the modules they weigh, and what they hold during one forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..experts import Experts, Projections
from ..experts.rules import Ruled
from .block import BlockExperts
from .gate import Gate
from .spec import GateSpec


def up_blocks(spec: GateSpec, experts: Experts, dtype: torch.dtype) -> list[Tensor]:
    """B_i, scaling folded in, of every entry module and expert, in the order of the projections."""
    blocks: list[Tensor] = []
    for name in spec.entry_sites:
        stack = experts.sites[name].stack
        blocks += stack.up_as(dtype).split([rank for rank in stack.ranks if rank], dim=1)
    return blocks


class Current:
    """Weights of one scope in one pass, and the input they were computed from."""

    def __init__(self, source: weakref.ref[Projections], weights: Tensor) -> None:
        self.source = source
        self.weights = weights


class Binding:
    """What ties gates to attached experts; a copy of the gates starts without.

    Args:
        experts: The experts.
        specs: What each gate weighs and reads.
        gates: The gates, in this order.
    """

    def __init__(self, experts: Experts, specs: Sequence[GateSpec], gates: Sequence[Gate]) -> None:
        self.sites = experts.sites
        self.gates = {spec.name: gate for spec, gate in zip(specs, gates, strict=True)}
        self.spec_of = {site: spec for spec in specs for site in spec.sites}
        groups = {id(site.group): site.group for site in self.sites.values()}.values()
        names = [[site.name for site in group.sites] for group in groups if group.several]
        # Modules that share a gate with all others that read the same tensor.
        self.of_groups = frozenset(
            name for group in names if len({self.spec_of.get(name) for name in group}) == 1 for name in group
        )
        self.blocks: dict[str, BlockExperts] = {}
        self.ruled: dict[str, Ruled] = {}  # what compiled graphs have of the gates

    def __deepcopy__(self, memo: Any) -> None:
        return None
