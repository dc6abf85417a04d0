"""The pass without LoRAs that shows where things will stand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator

from ..composition import Call, Composition


class _SeenEnough(BaseException):
    """Enough was seen; ends the pass. No error, so that nobody on the way out takes it for one and logs it."""


@contextmanager
def drawing_prior(pipe: Any, method: Composition, call: Call, kwargs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Inside the `with`, a call of the pipeline with the arguments handed out is the prior pass of a method.

    It ends as soon as the method has seen enough, and leaves all random numbers as they were, so that the picture
    begins from the same noise.

    Args:
        pipe: The pipeline.
        method: It says when it is done.
        call: The call the pass belongs to.
        kwargs: The arguments of the pipeline's call.
    """
    denoiser = getattr(pipe, pipe.family.denoiser)

    def look(*_: Any) -> None:
        run = pipe.experts.context
        # Other threads may draw with these models too.
        if run is not None and run.call is call and method.prior_done(run):
            raise _SeenEnough

    given = kwargs.get("generator")
    generators: list[Generator] = [given] if isinstance(given, Generator) else list(given or ())
    before = [(generator, generator.get_state()) for generator in generators]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    settings = dict(getattr(pipe, "_progress_bar_config", {}))
    prior = {key: value for key, value in kwargs.items() if not key.startswith("callback")}
    handle = denoiser.register_forward_hook(look)
    call.prior = True
    try:
        pipe.set_progress_bar_config(**{**settings, "desc": "looking for subjects", "leave": False})
        with torch.random.fork_rng(devices):
            yield prior
    except _SeenEnough:
        pass
    finally:
        call.prior = False
        handle.remove()
        pipe.set_progress_bar_config(**settings)
        for generator, state in before:
            generator.set_state(state)
