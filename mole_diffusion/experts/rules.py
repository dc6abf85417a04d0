"""Rules by which a compiled graph weighs LoRAs itself, from what a module reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

# What a module reads, `(batch, tokens, width)`; `down` of that, `(batch, tokens, R)`; `keep`, `scale` and what a method
# tells beside, `(3, batch, N)`; tensors and numbers of `Ruled`: to weights, `(batch, tokens, N)`, or `(batch, tokens,
# modules, N)` where it is asked `together`. Called while a graph is written down; it writes into nothing.
Rule = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor], Sequence[float]], Tensor]


class Ruled(NamedTuple):
    """What a graph needs to weigh LoRAs at a module by a rule.

    Attributes:
        rule: Its name in `RULES`.
        scope: What modules of one compiled part that have their weights in common are called there; alike in parts of
            one kind, so that these share a graph. "" for a module that has its own.
        tensors: What the rule computes with.
        numbers: Likewise; other numbers make another graph.
        reads: Whether the rule is given what this module reads; else the weights are those of one before.
        together: Whether the rule is given `down x` of all modules that read the same tensor, side by side and as wide
            as one another, and gives weights of each.
        orthonormal: Whether `down x` is to be that of `ExpertStack.with_orthonormal_columns`.
    """

    rule: str
    scope: str
    tensors: tuple[Tensor, ...]
    numbers: tuple[float, ...]
    reads: bool
    together: bool = False
    orthonormal: bool = False


RULES: dict[str, Rule] = {}  # an operator of torch takes names, not functions
