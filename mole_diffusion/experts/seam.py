"""What one attention layer of a denoiser asks, passed on to whoever weighs."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Asked(Protocol):
    """Who knows which weigher there is in the present pass: the experts."""

    def watched(self, component: str) -> bool: ...
    def biased(self, component: str) -> bool: ...
    def bias(self, component: str, layer: LayerSeam, query: Tensor, key: Tensor) -> Tensor | None: ...
    def attended(self, component: str, layer: LayerSeam, query: Tensor, key: Tensor, output: Tensor) -> None: ...


class LayerSeam:
    """The :class:`~.processor.AttentionSeam` of one layer.

    Args:
        experts: They know who weighs in the present pass.
        component: The denoiser.
        name: Of the attention layer in it.
        crossed: Whether it attends to the prompt.
        scale: What scores are multiplied by before the softmax.
    """

    def __init__(self, experts: Asked, component: str, name: str, crossed: bool, scale: float) -> None:
        self._experts = experts
        self._component = component
        self.name = name
        self.crossed = crossed
        self.scale = scale

    def watched(self) -> bool:
        return self._experts.watched(self._component)

    def biased(self) -> bool:
        return self._experts.biased(self._component)

    def bias(self, query: Tensor, key: Tensor) -> Tensor | None:
        return self._experts.bias(self._component, self, query, key)

    def attended(self, query: Tensor, key: Tensor, output: Tensor) -> None:
        self._experts.attended(self._component, self, query, key, output)
