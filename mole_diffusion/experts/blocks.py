"""What `with` blocks set for the thread (or task) inside of them, in whatever order and thread they end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(eq=False)
class _Block(Generic[Value]):
    value: Value
    over: bool = False


class Blocks(Generic[Value]):
    """Values, each of a `with` block that is open.

    Blocks in generators end when these go on or are thrown away: not the innermost first, and perhaps in another
    thread. A context variable's own `reset` would then bring back what had ended before, for good.

    Args:
        name: Of the context variable behind it.
    """

    def __init__(self, name: str) -> None:
        self._blocks: ContextVar[tuple[_Block[Value], ...]] = ContextVar(name, default=())

    def __iter__(self) -> Iterator[Value]:
        """The values of the blocks that are open, the innermost first."""
        for block in reversed(self._blocks.get()):
            if not block.over:
                yield block.value

    @contextmanager
    def open(self, value: Value) -> Iterator[None]:
        """A `with` block of this value."""
        block = _Block(value)
        self._blocks.set((*self._blocks.get(), block))
        try:
            yield
        finally:
            block.over = True  # also where another thread or task has it
            self._blocks.set(tuple(one for one in self._blocks.get() if not one.over))
