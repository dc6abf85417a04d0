"""The loop all toybox trainings share: seeded by step, resumable, with a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mole_diffusion.training.engine.checkpoint import CheckpointFolder
from mole_diffusion.training.engine.loop import TrainingLoop

_SAVE_EVERY_SECONDS = 60.0


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


def run_stage(
    stage: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    step_fn: Callable[[int], dict[str, Tensor]],
    *,
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
        step_fn: Takes the number of a step and returns its loss terms; `"loss"` is minimised.
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
    saved_at = time.monotonic()

    def take_step(step: int) -> dict[str, float]:
        losses = step_fn(step)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(module, step)
        return {name: value.item() for name, value in losses.items()}

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
