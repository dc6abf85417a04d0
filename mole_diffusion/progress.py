"""How far a long piece of work is: a bar where somebody watches, now and then a line in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY = 30.0  # seconds, at least, between the lines in a log
SPEED_OVER = 600.0  # seconds; over rich's 30 a step of half a minute would never have a speed


Item = TypeVar("Item")


class ProgressBar:
    """Shows nothing; what `progress_bar` hands out where nothing is to be shown."""

    def advance(self, count: int = 1, text: str = "") -> None:
        """`count` more are done; `text` stands beside the bar."""

    def note(self, text: str) -> None:
        """Puts `text` beside the bar."""


@contextmanager
def progress_bar(title: str, total: int, start: int = 0, *, enabled: bool = True) -> Iterator[ProgressBar]:
    """A bar on standard error, lines where that is no terminal.

    Args:
        title: What is done.
        total: How many there are.
        start: How many were done before.
        enabled: Whether to show anything.
    """
    console = Console(stderr=True)
    if not enabled:
        yield ProgressBar()
    elif console.is_terminal or console.is_jupyter:
        with _bar(console) as bar:
            yield _Bar(bar, title, total, start)
    else:
        yield _Lines(console, title, total, start)


def tracked(items: Sequence[Item], title: str) -> Iterator[Item]:
    """Each of `items`, with a bar."""
    with progress_bar(title, len(items)) as bar:
        for item in items:
            yield item
            bar.advance()


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, speed_estimate_period=SPEED_OVER)


class _Bar(ProgressBar):
    """In a terminal or a notebook."""

    def __init__(self, bar: Progress, title: str, total: int, start: int) -> None:
        self._bar = bar
        self._task = bar.add_task(title, total=total, completed=start, text="")

    def advance(self, count: int = 1, text: str = "") -> None:
        self._bar.update(self._task, advance=count, text=text)

    def note(self, text: str) -> None:
        self._bar.update(self._task, text=text)


class _Lines(ProgressBar):
    """For a log that nobody watches: the first piece, the last, and what lies half a minute apart."""

    def __init__(self, console: Console, title: str, total: int, start: int) -> None:
        self._console, self._title, self._total, self._start = console, title, total, start
        self._done = start
        self._begun, self._printed = time.monotonic(), 0.0

    def advance(self, count: int = 1, text: str = "") -> None:
        first = self._done == self._start
        self._done += count
        if first or self._done >= self._total:
            self._print(text)
        else:
            self.note(text)

    def note(self, text: str) -> None:
        if time.monotonic() - self._printed >= LINE_EVERY:
            self._print(text)

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        elapsed, done = self._printed - self._begun, self._done - self._start
        left = f", {_clock(elapsed / done * (self._total - self._done))} left" if done else ""
        line = f"{self._title} {self._done}/{self._total}  {text}{'  ' if text else ''}{_clock(elapsed)} elapsed{left}"
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
