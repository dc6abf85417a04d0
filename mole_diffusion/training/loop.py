"""What every training loop here shares: random numbers, learning rate, precision, the stop at NaN."""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import MoLEError

MixedPrecision = Literal["no", "fp16", "bf16"]
LearningRateSchedule = Literal["cosine", "constant"]


class TrainingDivergedError(MoLEError):
    """The loss became NaN or infinite; the message names the step."""


def step_generator(seed: int, step: int) -> torch.Generator:
    """A fresh CPU generator for one step: the numbers of step k do not depend on where a resumed run began.

    On the CPU whatever the device, so that a run draws the same pictures and noise everywhere.
    """
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def learning_rate_factor(step: int, steps: int, warmup_steps: int, schedule: LearningRateSchedule = "cosine") -> float:
    """Linear warm-up over `warmup_steps`, then 1, or half a cosine down from 1 towards zero at `steps`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


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


def check_step_settings(config: Any) -> None:
    """Checks the fields that every training config has; Raises: ValueError with the field, its value and the remedy."""
    for field in ("steps", "batch_size"):
        if getattr(config, field) < 1:
            raise MoLEError(f"`{field}` must be at least 1, got {getattr(config, field)}.")
    for field in ("warmup_steps", "checkpoint_every"):
        if getattr(config, field) < 0:
            raise MoLEError(f"`{field}` must be 0 (off) or more, got {getattr(config, field)}.")
    if config.warmup_steps >= config.steps:
        raise MoLEError(f"`warmup_steps` ({config.warmup_steps}) must be fewer than `steps` ({config.steps}).")
    for field in ("learning_rate", "max_grad_norm"):
        if not (math.isfinite(getattr(config, field)) and getattr(config, field) > 0):
            raise MoLEError(f"`{field}` must be positive and finite, got {getattr(config, field)}.")
    if not (math.isfinite(config.weight_decay) and config.weight_decay >= 0):
        raise MoLEError(f"`weight_decay` must be 0 or more, got {config.weight_decay}.")
    if config.mixed_precision not in ("no", "fp16", "bf16"):
        raise MoLEError(f'`mixed_precision` must be "no", "fp16" or "bf16", got {config.mixed_precision!r}.')


class Precision:
    """Mixed precision of one training: autocast around the forward pass, loss scaling for fp16, clipped steps.

    Torch's own autocast, since accelerate's precision is one setting for the whole process and a second training in a
    notebook may want another.

    Raises:
        ValueError: fp16 was asked for on a CPU, which has no loss scaling in fp16 worth having.
    """

    def __init__(self, mode: MixedPrecision, device: torch.device) -> None:
        if mode == "fp16" and device.type == "cpu":
            raise MoLEError('`mixed_precision="fp16"` needs a GPU, and the pipeline is on the CPU. Use "bf16" or "no".')
        self._device = device
        self._dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[mode]
        self._scaler = torch.amp.GradScaler(device.type, enabled=mode == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which matrix products run in the chosen precision."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)

    def step(
        self, loss: Tensor, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], max_grad_norm: float
    ) -> None:
        """One optimiser step on `loss`, gradients clipped to `max_grad_norm` and freed afterwards."""
        self.backward(loss)
        self.update(optimizer, parameters, max_grad_norm)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss` to those that are there."""
        self._scaler.scale(loss).backward()

    def update(self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], max_grad_norm: float) -> float:
        """One optimiser step on the gradients there are, clipped to `max_grad_norm` and freed afterwards.

        Returns:
            Their norm before clipping. If it is not finite, the step is left out; fp16 then lowers its loss scale.
        """
        self._scaler.unscale_(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
        if self._scaler.is_enabled() or math.isfinite(norm):
            self._scaler.step(optimizer)
            self._scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the loss scale (empty unless fp16)."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved loss scale."""
        self._scaler.load_state_dict(state)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Puts `models` into evaluation mode (no dropout); on exit each module's mode is as before."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def gradient_checkpointing(*models: Any, enabled: bool) -> Iterator[None]:
    """Has `models` recompute their insides in the backward pass; on exit each is as before."""
    switched = [model for model in models if enabled and not model.is_gradient_checkpointing]
    try:
        for model in switched:
            model.enable_gradient_checkpointing()
        yield
    finally:
        for model in switched:
            model.disable_gradient_checkpointing()


def peak_memory(device: torch.device) -> float | None:
    """GiB: the most that tensors took on a GPU since the process started, elsewhere the process's resident memory.

    None on systems that do not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@contextlib.contextmanager
def without_gradients(*models: nn.Module) -> Iterator[None]:
    """Freezes every parameter of `models`; on exit each `requires_grad` is as before."""
    flags = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def make_optimizer(parameters: list[Tensor], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW in one fused kernel, which matters with hundreds of small LoRA factors."""
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)
