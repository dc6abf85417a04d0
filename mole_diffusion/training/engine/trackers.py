"""Where the numbers of a running training go, besides the screen."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from accelerate.tracking import TensorBoardTracker, WandBTracker

from mole_diffusion.choices import TRACKERS, Tracker
from mole_diffusion.errors import MoLEError

PROJECT = "mole-train-gates"


class Log(Protocol):
    """Takes the numbers of one step."""

    def __call__(self, numbers: Mapping[str, float], step: int) -> None: ...


@contextmanager
def tracking(log_with: Tracker, folder: Path, *, enabled: bool = True) -> Iterator[Log]:
    """Opens accelerate's tracker of that name, which `check_log_with` let through, and closes it at the end.

    Args:
        log_with: "tensorboard" writes below `folder`, "wandb" sends to where `wandb login` said, "none" does nothing.
        folder: Where TensorBoard's files go.
        enabled: False in all processes but one.
    """
    if log_with == "none" or not enabled:
        yield lambda numbers, step: None
        return
    tracker: Any = WandBTracker(PROJECT) if log_with == "wandb" else TensorBoardTracker(PROJECT, folder)
    tracker.start()
    try:
        yield lambda numbers, step: tracker.log(dict(numbers), step=step)
    finally:
        tracker.finish()


def check_log_with(log_with: str) -> None:
    """Raises MoLEError for a tracker that does not exist, or whose package is not installed."""
    if log_with == "none":
        return
    if log_with not in TRACKERS:
        raise MoLEError(f"`log_with` must be one of {', '.join(TRACKERS)}, got {log_with!r}.")
    if importlib.util.find_spec(log_with) is None:
        raise MoLEError(
            f'log_with="{log_with}" needs the package {log_with}, which is not installed. Install it with '
            f'`pip install {log_with}`, or use log_with="none".'
        )
