"""The progress of a training: how far, the losses, the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from mole_diffusion.progress import progress_bar

Advance = Callable[[Mapping[str, float]], None]


@contextmanager
def training_progress(title: str, steps: int, start: int = 0, *, enabled: bool = True) -> Iterator[Advance]:
    """A bar on standard error, lines where that is no terminal; hands out `advance(losses)`, to be called every step.

    The losses shown are running means, since the loss of one step says little.
    """
    means: dict[str, float] = {}

    def smoothed(losses: Mapping[str, float]) -> str:
        for name, value in losses.items():
            means[name] = 0.95 * means.get(name, value) + 0.05 * value
        return "  ".join(f"{name} {value:.4f}" for name, value in means.items())

    with progress_bar(title, steps, start, enabled=enabled) as bar:
        yield lambda losses: bar.advance(text=smoothed(losses))
