"""A method that changes the weights another one gives."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import MoLEError
from ..experts import Run, Site
from .base import Composition


class Wrapper(Composition):
    """Stands around another method and asks it everything; what it makes of the weights is its own `weigh`.

    Args:
        method: The method that is asked.

    Raises:
        MoLEError: `method` is no method.
    """

    def __init__(self, method: Composition) -> None:
        if not isinstance(method, Composition):
            raise MoLEError(f"`method` must be a composition such as Masks(), got {method!r}.")
        self.method: Any = method
        self.needs = method.needs

    def reads_left_out(self, site: Site) -> bool:
        return bool(self.method.reads_left_out(site))

    def passes(self, run: Run) -> int:
        return int(self.method.passes(run))

    def combine(self, predictions: Tensor, run: Run) -> Tensor:
        combined: Tensor = self.method.combine(predictions, run)
        return combined

    def evaluations(self, num_loras: int) -> float:
        return float(self.method.evaluations(num_loras))

    def prior_done(self, run: Run) -> bool:
        return bool(self.method.prior_done(run))

    @property
    def orthonormal(self) -> bool:
        return bool(self.method.orthonormal)

    @property
    def in_attention(self) -> bool:
        return bool(self.method.in_attention)

    @property
    def crossed_alone(self) -> bool:
        return bool(self.method.crossed_alone)

    def watches(self, run: Run) -> bool:
        return bool(self.method.watches(run))

    def attended(self, *shown: Any) -> None:
        self.method.attended(*shown)

    def biases(self, run: Run) -> bool:
        return bool(self.method.biases(run))

    def attention_bias(self, *asked: Any) -> Tensor | None:
        bias: Tensor | None = self.method.attention_bias(*asked)
        return bias

    def keeps_apart(self, run: Run) -> bool:
        return bool(self.method.keeps_apart(run))

    def apart(self, *asked: Any) -> Tensor | None:
        bias: Tensor | None = self.method.apart(*asked)
        return bias
