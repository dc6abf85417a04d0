"""The progress of a training: how far, the losses, the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY = 30.0  # seconds, at least, between the lines in a log
SPEED_OVER = 600.0  # seconds; over rich's 30 a step of half a minute would never have a speed

Advance = Callable[[Mapping[str, float]], None]


@contextmanager
def training_progress(title: str, steps: int, start: int = 0, *, enabled: bool = True) -> Iterator[Advance]:
    """A bar on standard error, lines where that is no terminal; hands out `advance(losses)`, to be called every step.

    The losses shown are running means, since the loss of one step says little.
    """
    console = Console(stderr=True)
    means: dict[str, float] = {}

    def smoothed(losses: Mapping[str, float]) -> str:
        for name, value in losses.items():
            means[name] = 0.95 * means.get(name, value) + 0.05 * value
        return "  ".join(f"{name} {value:.4f}" for name, value in means.items())

    if not enabled:
        yield lambda losses: None
    elif console.is_terminal or console.is_jupyter:
        with _bar(console) as bar:
            task = bar.add_task(title, total=steps, completed=start, losses="")
            yield lambda losses: bar.update(task, advance=1, losses=smoothed(losses))
    else:
        yield _lines(console, title, steps, start, smoothed)


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, speed_estimate_period=SPEED_OVER)


def _lines(
    console: Console, title: str, steps: int, start: int, smoothed: Callable[[Mapping[str, float]], str]
) -> Advance:
    """For the log of a training that nobody watches: the first step, the last, and what lies half a minute apart."""
    begun = time.monotonic()
    done, printed = start, 0.0

    def advance(losses: Mapping[str, float]) -> None:
        nonlocal done, printed
        done += 1
        shown, now = smoothed(losses), time.monotonic()
        if done not in (start + 1, steps) and now - printed < LINE_EVERY:
            return
        printed = now
        elapsed = now - begun
        left = elapsed / (done - start) * (steps - done)
        line = f"{title} {done}/{steps}  {shown}  {_clock(elapsed)} elapsed, {_clock(left)} left"
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    return advance


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
