"""What `with` blocks set for the thread, task or generator inside of them, in whatever order and thread they end."""

from __future__ import annotations

import gc
import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import AsyncGeneratorType, FrameType
from typing import Any, Generic, TypeVar
from weakref import ref

from ..errors import MoLEError

Value = TypeVar("Value")

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_ENTERING = ("contextlib", "_pytest.fixtures")  # they run a generator up to its `yield`, for what comes after


@dataclass(eq=False)
class _Block(Generic[Value]):
    """A `with` block: its value, for whom it is, the generator it stands in, if any, and the thread it began in."""

    value: Value
    of: Any
    generator: FrameType | None
    thread: int
    over: bool = False
    asynchronous: ref[AsyncGeneratorType[Any, Any]] | None = None

    @property
    def waits(self) -> bool:
        """Whether it stands in a generator that does not run now, in any thread."""
        return self._stands_still and not self.awaits

    @property
    def awaits(self) -> bool:
        """Whether it stands in an asynchronous generator that awaits what another thread does, which is this one."""
        if not self._stands_still or threading.get_ident() == self.thread:
            return False
        assert self.generator is not None
        if not self.generator.f_code.co_flags & inspect.CO_ASYNC_GENERATOR:
            return False
        if self.asynchronous is None:  # which its frame does not tell
            found = (one for one in gc.get_objects() if type(one) is AsyncGeneratorType)
            self.asynchronous = ref(next(one for one in found if one.ag_frame is self.generator))
        asynchronous = self.asynchronous()
        return asynchronous is not None and asynchronous.ag_running

    @property
    def _stands_still(self) -> bool:
        return self.generator is not None and self.generator.f_back is None


class Blocks(Generic[Value]):
    """Values, each of a `with` block that is open.

    A context variable alone would not do. Blocks in generators end when these go on or are thrown away: not the
    innermost first, and perhaps in another thread, and its own `reset` would then bring back what had ended before,
    for good. And generators that take turns share the context of who calls them: a block in one holds while that one
    runs, wherever it is called from, and not while another does.

    Args:
        name: Of the context variable behind it.
    """

    def __init__(self, name: str) -> None:
        self._blocks: ContextVar[tuple[_Block[Value], ...]] = ContextVar(name, default=())
        self._in_generators: dict[FrameType, tuple[_Block[Value], ...]] = {}

    def holding(self, of: Any = None) -> Value | None:
        """The value of the innermost block for `of` that holds here, which those in generators that wait do not."""
        return next((block.value for block in self._here() if block.of is of and not block.waits), None)

    def told(self, of: Any) -> Value | None:
        """As `holding`, where a block that does not hold might be meant.

        Raises:
            MoLEError: The innermost stands in a generator that waits, so that nobody can tell.
        """
        blocks = [block for block in self._here() if block.of is of]
        if not blocks:
            return None
        block = blocks[0]
        if block.waits:  # which leaves one that has handed its work to this thread, and else nobody
            block = next((one for one in blocks if one.awaits), block)
        if block.waits:
            assert block.generator is not None
            code = block.generator.f_code
            place = f"{code.co_name} ({Path(code.co_filename).name}, line {block.generator.f_lineno})"
            raise MoLEError(
                f"a `with` block that chooses LoRAs, such as `composing`, is open in the generator {place}, which "
                "waits: nobody can tell whether what runs now belongs to it. Choose here too, by `with "
                "pipe.composing([...]):` around this call or `pipe(..., loras=[...])`; or run it in the generator; or "
                "make a generator that is to choose for others a `contextlib.contextmanager`."
            )
        return block.value

    @contextmanager
    def open(self, value: Value, of: Any = None) -> Iterator[None]:
        """A `with` block of this value.

        Args:
            value: Its value.
            of: Whom it is for.
        """
        generator = _generator()
        block = _Block(value, of, generator, threading.get_ident())
        self._blocks.set((*self._blocks.get(), block))
        if generator is not None:
            self._in_generators[generator] = (*self._in_generators.get(generator, ()), block)
        try:
            yield
        finally:
            block.over = True  # also where another thread or task has it
            self._blocks.set(tuple(one for one in self._blocks.get() if not one.over))
            if generator is not None:
                rest = tuple(one for one in self._in_generators.pop(generator) if not one.over)
                self._in_generators.update({generator: rest} if rest else {})

    def _here(self) -> Iterator[_Block[Value]]:
        """The open blocks of generators that run in this thread, then those of the context, the innermost first."""
        frame = sys._getframe() if self._in_generators else None
        while frame is not None:
            yield from reversed(self._in_generators.get(frame, ()))
            frame = frame.f_back
        yield from (block for block in reversed(self._blocks.get()) if not block.over)


def _generator() -> FrameType | None:
    """The innermost generator that runs here, other than those that stand for a `with` block."""
    frame: FrameType | None = sys._getframe()
    found = None
    while frame is not None:
        if frame.f_code.co_flags & _GENERATOR:
            found = found or frame
        elif found is not None:
            if frame.f_globals.get("__name__") not in _ENTERING:
                return found
            found = None
        frame = frame.f_back
    return found
