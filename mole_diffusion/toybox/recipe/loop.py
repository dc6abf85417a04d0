"""The loop all toybox trainings share: seeded by step, resumable, with a progress bar."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mole_diffusion.training.engine.checkpoint import CheckpointFolder
from mole_diffusion.training.engine.loop import TrainingLoop

_SAVE_EVERY_SECONDS = 60.0
_MOST_WORKERS = 14


def step_rng(seed: int, stage: str, step: int) -> np.random.Generator:
    """The random numbers of one step depend on nothing but seed, stage and step, so a resumed run repeats exactly."""
    return np.random.default_rng([seed, *stage.encode(), step])


def trapezoid(step: int, num_steps: int, warmup: int = 200, decay: float = 0.25) -> float:
    """Factor on the learning rate: warm-up, plateau, then a linear decay over the last quarter of the run.

    The plateau knows nothing of the number of steps: with a checkpoint from before the decay, a run can be made longer.
    """
    return min(1.0, (step + 1) / warmup, max(0.01, (num_steps - step) / (decay * num_steps)))


def decline(step: int, num_steps: int, warmup: int = 60) -> float:
    """Factor on the learning rate where trained weights are trained on: a short warm-up, then straight down to zero."""
    return min(1.0, (step + 1) / warmup, (num_steps - step) / num_steps)


class AveragedWeights:
    """Exponential moving average of a module's parameters; what is shipped."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {f"average.{name}": p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Takes in the parameters after a step; early on the average follows closely."""
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.tensors.values()), [p.detach() for p in module.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Puts the average in the module's place."""
        for p, average in zip(module.parameters(), self.tensors.values(), strict=True):
            p.copy_(average)


T = TypeVar("T")


class _MadeByNumber(Dataset[T], Generic[T]):
    """What `make` makes of a number, for a `DataLoader`."""

    def __init__(self, make: Callable[[int], T]) -> None:
        self.make = make

    def __getitem__(self, number: int) -> T:
        return self.make(number)


def _as_made(made: T) -> T:
    """A `DataLoader` would turn arrays within into tensors, each with an open file of its own on its way here."""
    return made


def made_ahead(make: Callable[[int], T], numbers: range, device: torch.device) -> Iterator[T]:
    """`make` of each number in turn; where a GPU computes, other processes make them before they are asked for.

    Drawing scenes and reading captions takes a processor longer than a GPU takes to learn from them.

    Args:
        make: Uses the processor only, and nothing but its number: it may run in a forked process.
        numbers: In their order.
        device: Where what is made is used.
    """
    workers = min(_MOST_WORKERS, len(os.sched_getaffinity(0)) - 1) if hasattr(os, "sched_getaffinity") else 0
    if device.type == "cpu" or workers < 1:
        return map(make, numbers)
    return iter(
        DataLoader(
            _MadeByNumber(make),
            sampler=numbers,
            batch_size=None,
            collate_fn=_as_made,
            num_workers=workers,
            prefetch_factor=4,
            multiprocessing_context="fork",
        )
    )


def run_stage(
    stage: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    make_batch: Callable[[int], T],
    step_fn: Callable[[T], dict[str, Tensor]],
    *,
    device: torch.device,
    num_steps: int,
    schedule: Callable[[int, int], float],
    work_dir: Path,
    seed: int,
    average: AveragedWeights,
    max_grad_norm: float = 1.0,
) -> None:
    """Trains until `num_steps`, taking up the checkpoint in `work_dir` if there is one; leaves the averaged weights.

    Args:
        stage: Name of the training, and of its folder of checkpoints.
        module: Everything that is trained.
        make_batch: Takes the number of a step and returns what `step_fn` needs; see `made_ahead`.
        step_fn: Takes that and returns loss terms; `"loss"` is minimised.
        device: Where `module` is.
        schedule: Gives the factor on the learning rate for a step and the number of steps.
        seed: Seed of the run; a checkpoint of another seed is refused.

    Raises:
        TrainingDivergedError: The loss is not finite; the last checkpoint is kept.
        MoLEError: The checkpoint is of another run.
    """
    parameters = dict(module.named_parameters())
    checkpoints = CheckpointFolder(work_dir / stage, f"toybox {stage}, seed {seed}")
    learning_rate = optimizer.param_groups[0]["lr"]
    loop = TrainingLoop(num_steps, parameters | average.tensors, optimizer, checkpoints, kept={})
    batches = made_ahead(make_batch, range(loop.start, num_steps), device)
    saved_at = time.monotonic()

    def take_step(step: int) -> dict[str, float]:
        losses = step_fn(next(batches))
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(module, step)
        values = torch.stack([value.detach() for value in losses.values()]).tolist()  # waits for a GPU once
        return dict(zip(losses, values, strict=True))

    def is_due(_: int) -> bool:
        nonlocal saved_at
        due = time.monotonic() - saved_at > _SAVE_EVERY_SECONDS
        saved_at = time.monotonic() if due else saved_at
        return due

    loop.run(
        stage,
        take_step,
        learning_rate=lambda step: learning_rate * schedule(step, num_steps),
        is_due=is_due,
    )
    average.copy_to(module)
