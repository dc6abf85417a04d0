"""From a method's numbers to the weights the experts ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..experts.run import Run
from ..experts.site import Projections, Site
from .base import Composition, Step


class NumberWeigher:
    """Weighs every place of the model alike, by the numbers of a composition method.

    Args:
        composition: A method whose weights are numbers.
        timesteps: Gives all timesteps of the present sampling run, as ``scheduler.timesteps`` does.
    """

    def __init__(self, composition: Composition, timesteps: Callable[[], Sequence[float] | Tensor]) -> None:
        self.composition = composition
        self.timesteps = timesteps

    def passes(self, run: Run) -> int:
        return len(self._numbers(run))

    def combine(self, predictions: Tensor, run: Run) -> Tensor:
        return self.composition.combine(predictions, self._numbers(run))

    def weights(self, site: Site, projections: Projections, run: Run) -> Tensor:
        """``(rows, 1, num_experts)``: the method's numbers times the user's scales."""
        weights = self._numbers(run) * run.scale  # (passes, rows, num_experts)
        if run.passes == 1:
            return weights[0][:, None]
        batch = len(projections.tensors[site.name]) // run.passes
        return weights.expand(-1, batch, -1).flatten(0, 1)[:, None]

    def _numbers(self, run: Run) -> Tensor:
        """``(passes, rows, num_experts)``, asked of the method once a forward pass and not once a layer."""
        if "numbers" not in run.notes:
            method = self.composition
            if run.timestep is None:
                weights = method.weights(run.keep, None)
                weights = None if weights is None else weights[None]
            else:
                weights = method.passes(run.keep, Step(run.timestep, self.timesteps()))
            if weights is None:
                raise TypeError(
                    f"composition {method.name!r} leaves the weights to gates; say so with "
                    f"`needs_gates = True` in {type(method).__name__}."
                )
            run.notes["numbers"] = weights
        numbers: Tensor = run.notes["numbers"]
        return numbers
