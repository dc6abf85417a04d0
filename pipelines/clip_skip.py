"""Leaving out the last layers of CLIP: `clip_skip`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

from ..errors import MoLEError
from .turns import turn


def refuse_clip_skip(pipe: Any, skip: Any) -> None:
    """Raises MoLEError unless `clip_skip` is a number of layers that leaves something to read; of 0 it leaves all.

    diffusers counts from the other end where it is negative.
    """
    if skip is None:
        return
    clips = [pipe.components.get(name) for name in ("text_encoder", "text_encoder_2")]
    layers = [clip.config.num_hidden_layers for clip in clips if clip is not None]
    most = min(layers, default=0) - pipe.family.never_read
    whole = isinstance(skip, Integral) and not isinstance(skip, bool)
    if layers and not (whole and 0 <= skip <= most):
        raise MoLEError(
            f"`clip_skip` is how many of the last layers of CLIP are left out: a whole number from 0 to {most} here, "
            f"or None, got {skip!r}."
        )


@contextmanager
def with_text_model(clip: Any) -> Iterator[None]:
    """CLIP has itself as `text_model`, where diffusers looks for its last norm once layers are left out.

    In Stable Diffusion's CLIP transformers has no such module any more, and diffusers ends in an AttributeError.
    """
    if clip is None:
        yield
        return
    with turn(clip):  # which pipelines of several threads may share
        if hasattr(clip, "text_model") or not hasattr(clip, "final_layer_norm"):
            yield
            return
        vars(clip)["text_model"] = clip  # as an attribute: no module is its own
        try:
            yield
        finally:
            del vars(clip)["text_model"]
