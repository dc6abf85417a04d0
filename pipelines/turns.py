"""One call at a time where calls would disturb each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

# A pipeline notes its settings on itself while it draws, a scheduler its steps, and a tokenizer how long prompts are to
# be: none of them serves two calls at once.
_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_MAKING = threading.Lock()
_INSIDE: ContextVar[tuple[Any, ...]] = ContextVar("pipelines and schedulers of the calls around", default=())


@contextmanager
def turn(*things: Any) -> Iterator[None]:
    """Waits until no other thread is inside of a `turn` with one of these."""
    with ExitStack() as stack:
        for thing in things:
            with _MAKING:
                lock = _LOCKS.setdefault(thing, threading.RLock())
            stack.enter_context(lock)
        yield


@contextmanager
def call_turn(pipe: Any, scheduler: Any) -> Iterator[None]:
    """A call's turn with its pipeline and its scheduler.

    A call inside of a call, as a callback may make one, leaves the one around it what both note on themselves.
    """
    with turn(pipe, scheduler):
        inside = _INSIDE.get()
        kept = [(thing, _noted(thing)) for thing in (pipe, scheduler) if any(thing is other for other in inside)]
        before = _INSIDE.set((*inside, pipe, scheduler))
        try:
            yield
        finally:
            _INSIDE.reset(before)
            for thing, noted in kept:
                vars(thing).update(noted)


def _noted(thing: Any) -> dict[str, Any]:
    """What an object remembers; lists are those of schedulers of several steps, which are changed in place."""
    return {name: list(value) if isinstance(value, list) else value for name, value in vars(thing).items()}
