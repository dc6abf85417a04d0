"""What a model is told when it is called: which step, which prompt, how large a sample."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def denoiser_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    given = by_name(model, args, kwargs)
    sample = sample_of(given)
    size = (sample.shape[-2], sample.shape[-1]) if isinstance(sample, Tensor) and sample.ndim == 4 else None
    return {
        "timestep": given.get("timestep"),
        "encoder_hidden_states": given.get("encoder_hidden_states"),
        "sample_size": size,
    }


def text_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": by_name(model, args, kwargs).get("input_ids")}


def is_denoiser(model: nn.Module) -> bool:
    return "timestep" in inspect.signature(model.forward).parameters


def by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def sample_of(given: Mapping[str, Any]) -> Any:
    return given.get("sample", given.get("hidden_states"))
