"""Modes that the models of a pipeline are in while something is trained beside them; afterwards each is as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
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


@contextmanager
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


@contextmanager
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
