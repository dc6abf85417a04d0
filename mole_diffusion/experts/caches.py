"""Caches of a denoiser, which answer with what LoRAs did in an earlier step."""

from __future__ import annotations

from torch import nn

from .attach import AttachError
from .run import Run


def refuse_caches(component: str, model: nn.Module, run: Run) -> None:
    """Raises AttachError where a cache would go on with other weights of the LoRAs than those of the present step.

    A weigher whose weights are the same in every step and everywhere says so by an attribute ``constant``: then a cache
    keeps what it would keep of a model with the LoRAs merged into it.
    """
    if not run.active or getattr(run.weigher, "constant", False):
        return
    cache = run.told.cache
    if cache is None and getattr(model, "is_cache_enabled", False):
        cache = f"{type(getattr(model, '_cache_config', None)).__name__}, which skips blocks or keeps what they gave"
    if cache is not None:
        method = getattr(run.weigher, "name", type(run.weigher).__name__)
        raise AttachError(
            f"{component} has a cache ({cache}), and composition {method!r} weighs LoRAs anew in every step and at "
            f"every place, which the cache would not follow. Call `{component}.disable_cache()`, draw with a pipeline "
            'without one, or with weights that stay: `set_composition("linear")`.'
        )
