"""What one attention layer of a denoiser asks, passed on to whoever weighs."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ..families import Joint
from .runs import Runs


class LayerSeam:
    """The `AttentionSeam` of one layer.

    Args:
        runs: They know who weighs in the present pass.
        component: The denoiser.
        name: Of the attention layer in it.
        crossed: Whether it attends to the prompt.
        scale: What scores are multiplied by before the softmax.
        halvings: How often a picture was halved on its way there.
    """

    def __init__(self, runs: Runs, component: str, name: str, crossed: bool, scale: float, halvings: int) -> None:
        self._runs = runs
        self._component = component
        self.attends = functools.partial(runs.attends, component, crossed)
        self.name = name
        self.crossed = crossed
        self.scale = scale
        self.halvings = halvings

    def watched(self) -> bool:
        """Whether the weigher wants to see what this layer computes in the present pass."""
        return bool(self.attends()) and self._runs.run(self._component).watched

    def biased(self) -> bool:
        """Whether the weigher may add to the scores of this layer in the present pass."""
        return bool(self.attends()) and self._runs.run(self._component).biased

    def bias(self, query: Tensor, key: Tensor) -> Tensor | None:
        """What the weigher adds to the scores of this layer, if anything."""
        run = self._runs.run(self._component)
        weigher: Any = run.weigher
        bias: Tensor | None = weigher.attention_bias(self, query, key, run) if self.biased() else None
        return bias

    def keeps_apart(self) -> bool:
        """Whether some words of the present pass are not for all to see, with LoRAs or without."""
        run = self._runs.run(self._component)
        keeps_apart = getattr(run.weigher, "keeps_apart", None)
        return keeps_apart is not None and bool(keeps_apart(run))

    def apart(self, joint: Joint, tokens: int) -> Tensor | None:
        """What the weigher adds to the scores of all tokens of this layer, to keep some apart.

        Args:
            joint: Where words and pixels stand.
            tokens: How many tokens there are.

        Returns:
            `(batch, 1, tokens, tokens)`, of queries and keys; `None`: nothing.
        """
        run = self._runs.run(self._component)
        weigher: Any = run.weigher
        found: Tensor | None = weigher.apart(joint, tokens, run)
        return found

    def attended(self, query: Tensor, key: Tensor, output: Tensor) -> None:
        """Show the weigher what this layer computed, if it wants to see it."""
        run = self._runs.run(self._component)
        weigher: Any = run.weigher
        if self.watched():
            weigher.attended(self, query, key, output, run)
