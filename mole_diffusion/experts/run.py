"""What one forward pass of a component was started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .weigher import Weigher


@dataclass(frozen=True, eq=False)
class Run:
    """One forward pass of one component: who weighs, what is kept, and what the denoiser was told.

    Frozen when the pass begins, because gradient checkpointing runs parts of it again during the backward pass, when
    the surrounding ``experts.using(...)`` may long be left and other passes may have followed.

    Attributes:
        component: ``"unet"``, ``"text_encoder"`` ...
        index: Counts the passes of this component.
        weigher: Who weighs, or ``None``: the base model.
        keep: ``(rows | 1, N)`` of 0 and 1.
        scale: ``(rows | 1, N)``.
        active: False if the experts add nothing in this pass.
        timestep: As the denoiser was given it; ``None`` in a text encoder.
        encoder_hidden_states: The prompt embeddings the denoiser was given; ``None`` in a text encoder.
        sample_size: ``(height, width)`` of the denoiser's sample where it has them.
        passes: How many times the batch runs at once, one block of rows after another; see :class:`WidensBatch`. The
            other attributes are those of one such pass.
        notes: What a weigher wants to remember for the rest of this pass and for its recomputation.
    """

    component: str
    index: int
    weigher: Weigher | None
    keep: Tensor
    scale: Tensor
    active: bool
    timestep: Tensor | float | None = None
    encoder_hidden_states: Tensor | None = None
    sample_size: tuple[int, int] | None = None
    passes: int = 1
    notes: dict[str, Any] = field(default_factory=dict)


def in_backward() -> bool:
    """Whether autograd is running, that is, whether a forward now is a checkpoint's recomputation."""
    return torch._C._current_graph_task_id() != -1
