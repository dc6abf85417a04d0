"""Kinds of adapters: what the tensors of one module mean together. A new kind is one file and one entry of `KINDS`."""

from __future__ import annotations

from collections.abc import Iterable

from .base import Change, Form, Kind, KindError, Shape
from .full import Full
from .loha import LoHa
from .lokr import LoKr
from .lora import PlainLoRA
from .tucker import Tucker

__all__ = ["KINDS", "Change", "Form", "Kind", "KindError", "Shape", "kind_of"]

KINDS: tuple[Kind, ...] = (Tucker(), LoHa(), LoKr(), Full(), PlainLoRA())


def kind_of(parts: Iterable[str]) -> Kind | None:
    """The kind that a module's parts are of; None where they tell of no change of weight (a bias alone).

    Raises:
        KindError: They are of two kinds at once.
    """
    names = set(parts)
    for kind in KINDS:
        if names & kind.marks:
            every = {mark for other in KINDS for mark in other.marks}
            if beyond := sorted((names & every) - kind.takes):
                raise KindError(f"factors of {kind.name} together with {', '.join(f'<{part}>' for part in beyond)}")
            return kind
    return None
