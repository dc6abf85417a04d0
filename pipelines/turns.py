"""One call at a time where calls would disturb each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

# A pipeline notes its settings on itself while it draws, and a scheduler its steps: neither serves two calls at once.
_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_MAKING = threading.Lock()


@contextmanager
def turn(pipe: Any) -> Iterator[None]:
    """Waits until no other thread draws with this pipeline or its scheduler."""
    with ExitStack() as stack:
        for thing in (pipe, pipe.scheduler):
            with _MAKING:
                lock = _LOCKS.setdefault(thing, threading.RLock())
            stack.enter_context(lock)
        yield
