"""Kinds of adapters: what the tensors of one module mean together. A new one is a file here."""

from __future__ import annotations

from collections.abc import Iterable

from mole_diffusion.discovery import one_of_each

from .base import Change, Form, Kind, KindError, Shape

__all__ = ["KINDS", "Change", "Form", "Kind", "KindError", "Shape", "kind_of"]

KINDS: tuple[Kind, ...] = tuple(one_of_each(__name__, Kind))
_MARKS = frozenset(mark for kind in KINDS for mark in kind.marks)


def kind_of(parts: Iterable[str]) -> Kind | None:
    """The kind that a module's parts are of; None where they tell of no change of weight (a bias alone).

    It is the one that takes most of them: one that has further parts has those of a simpler kind too.

    Raises:
        KindError: They are of two kinds at once.
    """
    told = _MARKS.intersection(parts)
    fitting = [kind for kind in KINDS if told & kind.marks]
    if not fitting:
        return None
    kind = max(fitting, key=lambda kind: len(told & kind.takes))
    if beyond := sorted(told - kind.takes):
        raise KindError(f"factors of {kind.name} together with {', '.join(f'<{part}>' for part in beyond)}")
    return kind
