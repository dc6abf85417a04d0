"""All modules of a model."""

from __future__ import annotations

from torch import nn


def every_module(model: nn.Module) -> list[nn.Module]:
    """The model and all modules in it, those above before those below; one that hangs in two places comes twice.

    For what looks at them in every call of a pipeline: `modules()` runs ten functions in Python for each.
    """
    found: list[nn.Module | None] = [model]
    for module in found:  # which grows meanwhile
        if module is not None:
            found += module._modules.values()
    return [module for module in found if module is not None]
