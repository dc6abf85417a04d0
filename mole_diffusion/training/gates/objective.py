"""What gates are trained for: the one seam between the walk that draws and the loss that judges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Drawn:
    """What the gates made of some prompts at one step of a walk; every tensor has the graph to the gates.

    Attributes:
        prompts: Index of each picture's prompt.
        noisy: The latents that the denoiser was asked about, (batch, ...), without a graph.
        timestep: The timestep of `noisy`.
        prediction: What it said, guidance included, of their shape, fp32.
        latents: What is judged as the picture: the clean latents that the prediction implies, or the next of the walk.
        decode: Turns latents into pictures; called only when `images` is read.
    """

    prompts: Sequence[int]
    noisy: Tensor
    timestep: float
    prediction: Tensor
    latents: Tensor
    decode: Callable[[Tensor], Tensor]

    @cached_property
    def images(self) -> Tensor:
        """The pictures, (batch, 3, height, width) in [0, 1]."""
        return self.decode(self.latents)


class Objective(Protocol):
    """L_D of eq. 16 of "Mixture of LoRA Experts" (https://openreview.net/forum?id=uWvKBCYh4S), whatever judges.

    `Guidance`, CLIP's, is one. Another needs neither CLIP nor pictures: it may look at the prediction alone.
    """

    def loss(self, drawn: Drawn) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss, a scalar with graph, and numbers to show beside it, by name."""
        ...

    def made_of(self) -> Mapping[str, Iterable[Tensor | str]]:
        """Tensors and texts that identify the objective, so that a checkpoint of one is refused by another.

        By the words that the refusal calls them by, such as "the CLIP".
        """
        ...
