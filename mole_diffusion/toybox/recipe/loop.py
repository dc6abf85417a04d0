"""The loop all toybox trainings share: seeded by step, resumable, with a progress bar."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

_SAVE_EVERY_SECONDS = 60.0


def step_rng(seed: int, stage: str, step: int) -> np.random.Generator:
    """The random numbers of one step depend on nothing but seed, stage and step, so a resumed run repeats exactly."""
    return np.random.default_rng([seed, *stage.encode(), step])


def cosine(step: int, num_steps: int, warmup: int = 100, floor: float = 0.02) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to the floor."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def trapezoid(step: int, num_steps: int, warmup: int = 200, decay: float = 0.25) -> float:
    """Factor on the learning rate: warm-up, plateau, then a linear decay over the last quarter of the run.

    The plateau knows nothing of the number of steps, so a finished run can be taken up before its decay and made
    longer.
    """
    return min(1.0, (step + 1) / warmup, max(0.01, (num_steps - step) / (decay * num_steps)))


class AveragedWeights:
    """Exponential moving average of a module's parameters; what is shipped."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        names, parameters = zip(*module.named_parameters(), strict=True)
        torch._foreach_lerp_([self.tensors[name] for name in names], [p.detach() for p in parameters], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, p in module.named_parameters():
            p.copy_(self.tensors[name])


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = optimizer.state_dict()["state"]
    return {f"optimizer.{k}.{name}": value for k, state in states.items() for name, value in state.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    packed = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        _, index, name = key.split(".", 2)
        state.setdefault(int(index), {})[name] = value
    packed["state"] = state
    optimizer.load_state_dict(packed)


def run_stage(
    stage: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    step_fn: Callable[[int], dict[str, Tensor]],
    *,
    num_steps: int,
    schedule: Callable[[int, int], float],
    work_dir: Path,
    average: AveragedWeights | None = None,
    max_grad_norm: float = 1.0,
    stop: Callable[[], bool] | None = None,
) -> None:
    """Train until ``num_steps``, taking up the checkpoint in ``work_dir`` if there is one.

    Args:
        stage: Name of the training; its checkpoint is ``<stage>.safetensors``, its losses ``<stage>.jsonl``.
        module: Everything that is trained; left with the averaged weights where ``average`` is given.
        step_fn: Step number in, loss terms out; ``"loss"`` is minimised.
        schedule: Step and number of steps in, factor on the learning rate out.
        stop: Asked after every checkpoint; ends the run early when true (a later call goes on).

    Raises:
        FloatingPointError: The loss is not finite; the last checkpoint is kept.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / f"{stage}.safetensors"
    base_rates = [group["lr"] for group in optimizer.param_groups]
    first = 0
    if path.exists():
        first = _resume(path, module, optimizer, average)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    bar = tqdm(range(first, num_steps), initial=first, total=num_steps, desc=stage, mininterval=2.0)
    saved = time.monotonic()
    running: dict[str, float] = {}
    for step in bar:
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * schedule(step, num_steps)
        losses = step_fn(step)
        loss = losses["loss"]
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{stage}: loss is {loss.item()} at step {step}; the last good state is {path}.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update(module, step)
        for name, value in losses.items():
            running[name] = 0.98 * running.get(name, value.item()) + 0.02 * value.item()
        if step % 50 == 49:
            bar.set_postfix({name: f"{value:.4f}" for name, value in running.items()})
            with open(work_dir / f"{stage}.jsonl", "a") as log:
                log.write(json.dumps({"step": step + 1, **running}) + "\n")
        if time.monotonic() - saved > _SAVE_EVERY_SECONDS or step + 1 == num_steps:
            _save(path, step + 1, module, optimizer, average)
            saved = time.monotonic()
            if stop is not None and stop():
                break
    if average is not None:
        average.copy_to(module)


def _save(
    path: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedWeights | None
) -> None:
    tensors = {f"module.{name}": p.detach() for name, p in module.named_parameters()}
    tensors |= _optimizer_tensors(optimizer)
    if average is not None:
        tensors |= {f"average.{name}": p for name, p in average.tensors.items()}
    temporary = path.with_suffix(".tmp")
    save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, temporary, {"step": str(step)})
    os.replace(temporary, path)


def _resume(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedWeights | None) -> int:
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        step = int(file.metadata()["step"])
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(tensors[f"module.{name}"])
    _load_optimizer(optimizer, {key: t for key, t in tensors.items() if key.startswith("optimizer.")})
    if average is not None:
        for name, p in average.tensors.items():
            p.copy_(tensors[f"average.{name}"])
    return step
