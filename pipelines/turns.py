"""One call at a time where calls would disturb each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

# A pipeline notes its settings on itself while it draws, a scheduler its steps, and a tokenizer how long prompts are to
# be: none of them serves two calls at once.
_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_MAKING = threading.Lock()


@contextmanager
def turn(*things: Any) -> Iterator[None]:
    """Waits until no other thread is inside of a `turn` with one of these."""
    with ExitStack() as stack:
        for thing in things:
            with _MAKING:
                lock = _LOCKS.setdefault(thing, threading.RLock())
            stack.enter_context(lock)
        yield
