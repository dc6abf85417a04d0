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
        composition: A method whose :meth:`~Composition.weights` are numbers.
        timesteps: Gives all timesteps of the present sampling run, as ``scheduler.timesteps`` does.
    """

    def __init__(self, composition: Composition, timesteps: Callable[[], Sequence[float] | Tensor]) -> None:
        self.composition = composition
        self.timesteps = timesteps
        self._last: tuple[Run, Tensor] | None = None

    def weights(self, site: Site, projections: Projections, run: Run) -> Tensor:
        """``(rows, 1, num_experts)``: the method's numbers times the user's scales."""
        if self._last is None or self._last[0] is not run:  # once a pass, not once a layer
            step = None if run.timestep is None else Step(run.timestep, self.timesteps())
            numbers = self.composition.weights(run.keep, step)
            if numbers is None:
                raise TypeError(
                    f"composition {self.composition.name!r} leaves the weights to gates; say so with "
                    f"`needs_gates = True` in {type(self.composition).__name__}."
                )
            self._last = run, (numbers * run.scale)[:, None]
        return self._last[1]
