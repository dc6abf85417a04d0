"""The progress bar of a training: how far, the losses, the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def training_progress(
    title: str, steps: int, start: int = 0, *, enabled: bool = True
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A bar on standard error; hands out `advance(losses)`, to be called once a step.

    The losses shown are running means, since the loss of one step says little.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    means: dict[str, float] = {}
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as bar:
        task = bar.add_task(title, total=steps, completed=start, losses="")

        def advance(losses: Mapping[str, float]) -> None:
            for name, value in losses.items():
                means[name] = 0.95 * means.get(name, value) + 0.05 * value
            bar.update(task, advance=1, losses="  ".join(f"{name} {value:.4f}" for name, value in means.items()))

        yield advance
