"""Attention processors that a pipeline puts on while it draws, and would leave there where the call is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..experts import Experts
from ..families.parts import every_module


@contextmanager
def processors_given_back(models: Iterable[nn.Module], experts: Experts) -> Iterator[None]:
    """Where what is inside fails, puts the attention processors back that the models had before.

    Pipelines with self-attention guidance, or perturbed attention, exchange some, and give them back at the end of a
    call that ends well. Where the LoRAs were taken off meanwhile, so were their processors, and stay off.
    """
    layers: list[Any] = [
        layer for model in models for layer in every_module(model) if hasattr(type(layer), "set_processor")
    ]
    before = [getattr(layer, "processor", None) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, processor in zip(layers, before, strict=True):
            if experts.attached and getattr(layer, "processor", None) is not processor:
                layer.set_processor(processor)
        raise
