"""The one seam of a composition method: which passes a step runs, how much of each LoRA in each, and their mixture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Where in the denoising the model is called.

    Args:
        timestep: The timestep the denoiser was given, a number or a tensor of one or more (equal) entries.
        timesteps: All timesteps of this sampling run, in the order in which they come.
    """

    timestep: Tensor | float
    timesteps: Sequence[float] | Tensor

    @property
    def index(self) -> int:
        """Position of this step, from 0. Schedulers that visit a timestep twice (Heun) stay in the same step.

        Steps are told apart by their timesteps and not by counting calls, because a pipeline may call its denoiser
        several times in a step, or enter the schedule in the middle (image to image).
        """
        now = _first(self.timestep)
        return sum(timestep > now for timestep in set(_floats(self.timesteps)))

    @property
    def total(self) -> int:
        """Number of steps."""
        return len(set(_floats(self.timesteps)))


class Composition(ABC):
    """How several LoRAs share one picture.

    A method that runs the denoiser once a step implements :meth:`weights` and nothing else. One that runs it several
    times says so with :meth:`passes` and :meth:`evaluations`, and with :meth:`combine` unless predictions are averaged.
    Batching, guidance, text encoders, seeds and the choice of LoRAs are done once, outside of methods.

    Attributes:
        name: The name in :data:`COMPOSITIONS`.
        source: Where the method comes from.
        needs_gates: Whether the method reads trained gates; then a pipeline without gates refuses it.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    needs_gates: ClassVar[bool] = False

    @abstractmethod
    def weights(self, keep: Tensor, step: Step | None) -> Tensor | None:
        """Weight of every LoRA in this step, before the user's own scales.

        Args:
            keep: ``(rows, num_experts)``, 1 for a LoRA that takes part and 0 for one masked out; ``rows`` is 1 or
                the batch. Every row keeps at least one.
            step: The denoising step, or ``None`` while a text encoder reads the prompt, so that a method declares
                the state of the text encoder instead of inheriting what was active last.

        Returns:
            ``(rows, num_experts)`` with zeros where ``keep`` is zero, or ``None``: the gates in the layers decide.
        """

    def passes(self, keep: Tensor, step: Step) -> Tensor | None:
        """Weight of every LoRA in every pass of this step; by default one pass with :meth:`weights`.

        All passes get the same sample, timestep and prompt embeddings, and run as one widened batch.

        Returns:
            ``(passes, rows, num_experts)``, or ``None``: one pass, weighed by the gates in the layers.
        """
        weights = self.weights(keep, step)
        return None if weights is None else weights[None]

    def combine(self, predictions: Tensor, weights: Tensor) -> Tensor:
        """One prediction from those of all passes, before guidance; by default their mean.

        Args:
            predictions: ``(passes, batch, ...)``; with guidance the batch is the unconditional rows, then the others.
            weights: What :meth:`passes` returned; its rows are 1 or the batch.

        Returns:
            ``(batch, ...)``.
        """
        return predictions.mean(dim=0)

    def evaluations(self, num_loras: int) -> int:
        """How often a step evaluates the denoiser with this many LoRAs kept. Guidance doubles the batch, not this."""
        return 1


def _floats(timesteps: Sequence[float] | Tensor) -> list[float]:
    return [float(timestep) for timestep in (timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps)]


def _first(timestep: Tensor | float) -> float:
    return float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
