"""Mixed precision of one training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.errors import MoLEError
from mole_diffusion.training.engine.settings import MixedPrecision


class Precision:
    """Mixed precision of one training: autocast around the forward pass, loss scaling for fp16, clipped steps.

    Torch's own autocast, since accelerate's precision is one setting for the whole process and a second training in a
    notebook may want another.

    Raises:
        MoLEError: fp16 was asked for on a CPU, which has no loss scaling in fp16 worth having.
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
