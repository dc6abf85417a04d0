"""The loop that every training here runs in: steps, checkpoints, and a stop where a loss is no number."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mole_diffusion.errors import MoLEError
from mole_diffusion.files import NotWrittenError
from mole_diffusion.training.engine.checkpoint import CheckpointFolder
from mole_diffusion.training.engine.optimizer import set_learning_rate
from mole_diffusion.training.engine.progress import training_progress


class TrainingDivergedError(MoLEError):
    """The loss became NaN or infinite; the message names the step."""


class Kept(Protocol):
    """Something with a state of its own that a checkpoint keeps, as plain values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class TrainingLoop:
    """Steps of one training, taken up where its checkpoint was written.

    Args:
        steps: How many there are in all.
        parameters: What is trained, by name.
        optimizer: The optimiser of these parameters.
        checkpoints: Where checkpoints go; None keeps none. One of this training that is there is read now.
        kept: What else a checkpoint holds, by name; each is given its saved state back.

    Attributes:
        start: How many steps were done before.

    Raises:
        MoLEError: The checkpoint is of another training, or damaged.
    """

    def __init__(
        self,
        steps: int,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        checkpoints: CheckpointFolder | None,
        kept: Mapping[str, Kept],
    ) -> None:
        self.steps, self.start = steps, 0
        self._parameters, self._optimizer = parameters, optimizer
        self._checkpoints, self._kept = checkpoints, kept
        saved = None if checkpoints is None else checkpoints.load(parameters, optimizer, list(kept))
        if saved is not None:
            self.start, states = saved
            for name, one in kept.items():
                one.load_state_dict(states[name])

    def run(
        self,
        title: str,
        take_step: Callable[[int], Mapping[str, float]],
        *,
        learning_rate: Callable[[int], float],
        is_due: Callable[[int], bool],
        saves: bool = True,
        last_may_fail: bool = False,
        shown: Collection[str] | None = None,
        progress: bool = True,
        on_step_end: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        """Takes the steps that are left.

        Args:
            title: What the progress bar says.
            take_step: Takes the step of this number, from 0, and returns what is to be shown of it, by name.
            learning_rate: The learning rate of the step of this number.
            is_due: Whether to write a checkpoint after so many steps; the last step always does.
            saves: Whether this process writes checkpoints.
            last_may_fail: Whether what was learned goes somewhere else too, so that the last checkpoint may fail.
            shown: Names of the numbers that the bar shows; None is all.
            progress: Whether to show a bar.
            on_step_end: Called with the number of steps done and the numbers of the last.

        Raises:
            TrainingDivergedError: A number is NaN or infinite; the last checkpoint is from before.
            NotWrittenError: A checkpoint cannot be written.
        """
        with training_progress(title, self.steps, self.start, enabled=progress) as advance:
            for step in range(self.start, self.steps):
                set_learning_rate(self._optimizer, learning_rate(step))
                numbers, done = take_step(step), step + 1
                check_finite(numbers, done, None if self._checkpoints is None else self._checkpoints.latest)
                if saves and (done == self.steps or is_due(done)):
                    self._save(done, last_may_fail)
                advance({name: value for name, value in numbers.items() if shown is None or name in shown})
                if on_step_end is not None:
                    on_step_end(done, numbers)

    def _save(self, done: int, last_may_fail: bool) -> None:
        if self._checkpoints is None:
            return
        states = {name: one.state_dict() for name, one in self._kept.items()}
        try:
            self._checkpoints.save(done, self._parameters, self._optimizer, states)
        except NotWrittenError:
            if done < self.steps or not last_may_fail:
                raise


def every(steps: int) -> Callable[[int], bool]:
    """Whether a number of steps is a multiple of `steps`; never where that is 0."""
    return lambda done: steps > 0 and done % steps == 0


def check_finite(losses: Mapping[str, float], step: int, checkpoint: Path | None = None) -> None:
    """Raises `TrainingDivergedError` if one of the `losses` of `step` is NaN or infinite.

    Args:
        losses: Term to value.
        step: For the message, from 1.
        checkpoint: The last checkpoint, which is good since it was written after such a check; None if there is none.
    """
    broken = {name: value for name, value in losses.items() if not math.isfinite(value)}
    if broken:
        terms = ", ".join(f"{name} = {value}" for name, value in broken.items())
        last = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was written before."
        raise TrainingDivergedError(
            f"Training stopped at step {step}: {terms}. Lower the learning rate, or train in fp32 "
            f'(`mixed_precision="no"`). {last}'
        )
