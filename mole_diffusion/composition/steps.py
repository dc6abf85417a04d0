"""The common case of a method: numbers per LoRA and step, alike in every module."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ..experts import Projections, Run, Site
from .base import Composition
from .step import Step, refuse_untold, step_of


class StepComposition(Composition):
    """A method whose weights are numbers: one per LoRA, the same in every module and at every place, anew each step.

    A method that runs the denoiser once a step implements `weights` and nothing else. One that runs it several
    times says so with `weights_by_pass` and `evaluations`, and with `mix` unless predictions are
    averaged.
    """

    @property
    def alike(self) -> bool:
        """Whether all modules of a pass get the same tensor, so that it is asked for once a pass."""
        return type(self).weigh is StepComposition.weigh

    @abstractmethod
    def weights(self, keep: Tensor, step: Step | None) -> Tensor:
        """Weight of every LoRA in this step, before the user's own scales.

        Args:
            keep: `(rows, num_experts)`, 1 for a LoRA that takes part and 0 for one masked out; `rows` is 1 or
                the batch. Every row keeps at least one.
            step: The denoising step, or `None` while a text encoder reads the prompt, so that a method declares
                the state of the text encoder instead of inheriting what was active last.

        Returns:
            `(rows, num_experts)` with zeros where `keep` is zero.
        """

    def weights_by_pass(self, keep: Tensor, step: Step) -> Tensor:
        """Weight of every LoRA in every pass of this step; by default one pass with `weights`.

        All passes get the same sample, timestep and prompt embeddings, and run as one widened batch.

        Returns:
            `(passes, rows, num_experts)`.
        """
        return self.weights(keep, step)[None]

    def mix(self, predictions: Tensor, weights: Tensor) -> Tensor:
        """One prediction from those of all passes, before guidance; by default their mean.

        Args:
            predictions: `(passes, batch, ...)`; with guidance the batch is the unconditional rows, then the others.
            weights: What `weights_by_pass` returned; its rows are 1 or the batch.

        Returns:
            `(batch, ...)`.
        """
        return predictions.mean(dim=0)

    def weigh(self, site: Site, projections: Projections, run: Run) -> Tensor:
        """`(rows, 1, num_experts)`: the method's numbers times the user's scales, worked out once a pass."""
        if "weights" not in run.notes:
            run.notes["weights"] = self._weights(projections.batch, run)
        weights: Tensor = run.notes["weights"]
        return weights

    def _weights(self, batch: int, run: Run) -> Tensor:
        """The very tensor of the pass before where nothing changed, so that what was made of it is kept."""
        key = self, "weights", run.component
        chosen = run.keep, run.scale
        before: tuple[tuple[Tensor, Tensor], Tensor] | None = None if run.call is None else run.call.state.get(key)
        if before is not None and self._stays and all(a is b for a, b in zip(before[0], chosen, strict=True)):
            return before[1]
        weights = self._numbers(run) * run.scale  # (passes, rows, num_experts)
        if run.passes > 1:
            weights = weights.expand(-1, batch // run.passes, -1)
        weights = weights.flatten(0, 1)[:, None]
        if run.call is None or weights.requires_grad:
            return weights
        if before is not None and before[1].device == weights.device and torch.equal(before[1], weights):
            weights = before[1]
        run.call.state[key] = chosen, weights
        return weights

    @property
    def _stays(self) -> bool:
        """Whether no step has other weights or another number of passes than the first, so that nobody need ask."""
        return self.constant and type(self).weights_by_pass is StepComposition.weights_by_pass

    def passes(self, run: Run) -> int:
        return 1 if self._stays else len(self._numbers(run))

    def combine(self, predictions: Tensor, run: Run) -> Tensor:
        return self.mix(predictions, self._numbers(run))

    def _numbers(self, run: Run) -> Tensor:
        """`(passes, rows, num_experts)`, asked of the method once a forward pass and not once a layer."""
        if "numbers" not in run.notes:
            if run.timestep is None and not self.constant:
                refuse_untold(run, self.name)
            if run.timestep is None or self._stays:
                numbers = self.weights(run.keep, None)[None]
            else:
                numbers = self.weights_by_pass(run.keep, step_of(run))
            run.notes["numbers"] = numbers
        numbers = run.notes["numbers"]
        return numbers
