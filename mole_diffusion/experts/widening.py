"""Several forward passes of the denoiser as one, over a widened batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def widen(value: Any, batch: int, passes: int, lists: bool = False) -> Any:
    """What a denoiser was given, for a batch that comes `passes` times over.

    Args:
        value: Arguments in any nesting of tuples, lists and dictionaries. Tensors whose first axis is the batch
            (sample, prompt embeddings, added conditions, residuals of a ControlNet) are repeated; others stay.
        batch: Rows of the sample.
        passes: How many times.
        lists: Whether lists as long as the batch hold one entry for each row.
    """
    if lists and isinstance(value, list) and len(value) == batch:
        return value * passes
    if isinstance(value, Tensor):
        return value.repeat(passes, *[1] * (value.ndim - 1)) if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return {name: widen(part, batch, passes, lists) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(widen(part, batch, passes, lists) for part in value)
    return value


def narrow(output: Any, passes: int, combine: Callable[[Tensor], Tensor]) -> Any:
    """The output of the widened batch as that of one pass.

    Args:
        output: A tensor, a list with a tensor for each row, a tuple, or a dictionary-like output class of these.
            Tensors are `(passes * batch, ...)`.
        passes: As in `widen`.
        combine: `(passes, batch, ...) -> (batch, ...)`.
    """
    if isinstance(output, Tensor):
        return combine(output.unflatten(0, (passes, -1)))
    if isinstance(output, list):
        return list(combine(torch.stack(output).unflatten(0, (passes, -1))))
    if isinstance(output, Mapping):
        return type(output)(**{name: narrow(part, passes, combine) for name, part in output.items()})
    return type(output)(narrow(part, passes, combine) for part in output)


def tensors(output: Any) -> list[Tensor]:
    """All tensors in what a model returned: a tensor, a tuple, or a dictionary-like output class."""
    found, parts = [], [output]
    for part in parts:  # which grow meanwhile
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, tuple | list):
            parts += part
        elif isinstance(part, Mapping):
            parts += part.values()
    return found
