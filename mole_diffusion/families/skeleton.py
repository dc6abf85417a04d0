"""A published base model as an empty shell: all modules with their sizes, no weights and no memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Components = dict[str, nn.Module]

DIFFUSERS_BLOCKS = r"(^|unet_)transformer_blocks_\d+_(attn_(to|add)_|ff_|norm1)"
"""A name of a module as diffusers has it in several families of transformers, with underscores for dots."""


@dataclass(frozen=True)
class Skeleton:
    """One published base model, with the sizes of its own config.

    Attributes:
        title: The name that people know it by.
        marks: A name of a module, with underscores for dots, that only such models have.
        make: Builds it; call `build`.
    """

    title: str
    marks: str
    make: Callable[[], Components]

    def build(self) -> Components:
        """Its components by name, on the meta device."""
        with torch.device("meta"):
            return self.make()
