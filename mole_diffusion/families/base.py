"""A family of models: what the pipelines of one base model have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from .architecture import Architecture


class Family:
    """One family of base models. A subclass sets what differs; an instance has no state.

    Attributes:
        name: As files and settings call it.
        title: As people call it.
        denoiser: The component that predicts noise.
        architectures: The components that can take LoRAs, and what they are. The denoiser is among them.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    denoiser: ClassVar[str]
    architectures: ClassVar[Mapping[str, Architecture]]

    def fits(self, components: Mapping[str, Any]) -> bool:
        """Whether the components of a pipeline are of this family.

        Args:
            components: By name. Those that are no models are passed over.
        """
        model = components.get(self.denoiser)
        return isinstance(model, nn.Module) and is_a(model, self.architectures[self.denoiser])


def is_a(model: nn.Module, architecture: Architecture) -> bool:
    """Whether a model is of an architecture, by the names of its class and of those it stands on."""
    return any(ancestor.__name__ in architecture.classes for ancestor in type(model).__mro__)
