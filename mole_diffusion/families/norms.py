"""Layers of normalisation: which a LoRA may change, and what they make of tokens before they scale and shift them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

# By name, since not every version of a library has them all: the weight at which each of them scales by one.
_NEUTRAL = {"LayerNorm": 1.0, "GroupNorm": 1.0, "RMSNorm": 1.0, "T5LayerNorm": 1.0, "Krea2RMSNorm": 0.0}
# These are given queries or keys with their heads on an axis of their own, before the tokens or behind them.
_OF_HEADS = frozenset({"norm_q", "norm_k", "norm_added_q", "norm_added_k"})


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises and then scales by one number for each feature."""
    weight = getattr(module, "weight", None)
    return _neutral(module) is not None and isinstance(weight, Tensor) and weight.ndim == 1


def is_of_heads(name: str) -> bool:
    """Whether a layer of normalisation is given the heads of queries or keys one by one.

    Args:
        name: As in `named_modules()`.
    """
    return name.rpartition(".")[2] in _OF_HEADS


@torch.no_grad()
def neutral(module: Any, device: torch.device) -> dict[str, Tensor | None]:
    """The parameters with which a layer of normalisation neither scales nor shifts.

    Args:
        module: The layer; its own weight may lie elsewhere just now.
        device: Where it runs.
    """
    value = _neutral(module)
    assert value is not None
    return {"weight": torch.full_like(module.weight, value, device=device), "bias": None}


def run_with(module: nn.Module, parameters: dict[str, Tensor | None], x: Tensor) -> Tensor:
    """What a layer would give with other parameters; neither it nor its hooks are touched."""
    twin = copy.copy(module)
    twin._parameters = parameters  # type: ignore[assignment]
    output: Tensor = type(module).forward(twin, x)
    return output


def _neutral(module: nn.Module) -> float | None:
    names = (kind.__name__ for kind in type(module).__mro__)
    return next((_NEUTRAL[name] for name in names if name in _NEUTRAL), None)
