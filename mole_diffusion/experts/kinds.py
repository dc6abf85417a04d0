"""Which kind of compiled graph suits all that is drawn just now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Literal, Protocol, TypeGuard
from weakref import WeakSet

from .run import Weigher, looks_on

Kind = Literal["modules", "places", "rules", "any"]
# Of more LoRAs most are left out of a call as a rule, and a graph that has the products itself computes all of them.
MOST_LORAS = 8


class Follower(Protocol):
    """Who has to know whose rules a graph follows."""

    def follow(self, weigher: Weigher) -> None: ...


class Kinds:
    """Which kind of graph suits everybody who draws just now, in whatever thread.

    A graph is looked for by it, and made once for each kind. Nobody can look then at who draws in the present thread:
    so it is one that is right for all.

    Args:
        num_loras: How many are loaded.

    Attributes:
        now: `"modules"`: weights are the same at all tokens of a module (`is_of_modules`), and nobody looks at
            attention. `"places"`: they follow from places (`is_of_places`). `"rules"`: all draw with one method that
            has rules for graphs (`has_rules`). `"any"`: every module asks, every time.
        weigher: Whose rules.
        followers: Told when these are another's.
        looked_at: Attention that somebody may want to see or change.
    """

    def __init__(self, num_loras: int) -> None:
        self.num_loras = num_loras
        self._drawing: tuple[Weigher | None, ...] = ()
        self.now: Kind = "any"
        self.weigher: Weigher | None = None
        self.followers: WeakSet[Follower] = WeakSet()
        self.looked_at: Literal["none", "to the prompt", "all"] = "none"
        self.settle(None)

    def shows(self, crossed: bool) -> bool:
        """Whether a graph is to have Python see and change an attention layer.

        Args:
            crossed: Whether it attends to the prompt.
        """
        return self.looked_at == "all" or (crossed and self.looked_at == "to the prompt")

    @contextmanager
    def drawing(self, weigher: Weigher | None, otherwise: Weigher | None) -> Iterator[None]:
        """Somebody draws with a method.

        Args:
            weigher: The method; `None` leaves it to who weighs elsewhere.
            otherwise: Who that is.
        """
        with _LOCK:
            self._drawing = (*self._drawing, weigher)
            self.settle(otherwise)
        try:
            yield
        finally:
            with _LOCK:
                index = next(i for i, one in enumerate(self._drawing) if one is weigher)
                self._drawing = self._drawing[:index] + self._drawing[index + 1 :]
                self.settle(otherwise)

    def settle(self, otherwise: Weigher | None) -> None:
        """Look again, with who weighs for those who left it open, and where nobody draws."""
        weighers = [otherwise if one is None else one for one in self._drawing] or [otherwise]
        looking = [one for one in weighers if looks_on(one)]
        self.looked_at = "none" if not looking else "all"
        if looking and all(getattr(one, "crossed_alone", False) for one in looking):
            self.looked_at = "to the prompt"
        if self.num_loras > MOST_LORAS:
            self.now = "any"
        elif all(is_of_modules(one) and not looks_on(one) for one in weighers):
            self.now = "modules"
        elif all(map(is_of_places, weighers)):
            self.now = "places"
        else:
            first, *others = (one for one in weighers if one is not None)  # who draws the base needs nothing
            self.now = "any"
            if has_rules(first) and all(one is first for one in others):
                self.now, self.weigher = "rules", first
                for follower in self.followers:
                    follower.follow(first)


_LOCK = RLock()


def is_of_modules(weigher: Weigher | None) -> bool:
    """Whether a method weighs alike at all tokens of a module."""
    return weigher is None or bool(getattr(weigher, "alike", False) or getattr(weigher, "of_modules", False))


def is_of_places(weigher: Weigher | None) -> bool:
    """Whether a method weighs alike at all modules of a place: what they read, how finely, and how many tokens."""
    return weigher is None or bool(getattr(weigher, "alike", False) or getattr(weigher, "of_places", False))


def has_rules(weigher: Weigher | None) -> TypeGuard[Weigher]:
    """Whether a method has rules for graphs, and needs nothing else there."""
    return bool(getattr(weigher, "has_rules", False)) and not looks_on(weigher)
