"""Which pipeline of ours a base model is for."""

from __future__ import annotations

import os
from typing import Any

from diffusers import DiffusionPipeline

from ..errors import printable
from ..loading import LoadingError, loading
from .mixin import MoLEPipelineMixin


def pipeline_class(base: str | os.PathLike[str], **kwargs: Any) -> type[MoLEPipelineMixin]:
    """The pipeline of ours that composes LoRAs on a base model: `pipeline_class(base).from_pretrained(base)`.

    Args:
        base: A folder as `save_pretrained` writes it, or the name of a repository on the Hub.
        kwargs: Of `from_pretrained` that say where a repository is found, such as `revision` and `token`.

    Returns:
        Of the task that the base names itself, text to image for nearly all.

    Raises:
        LoadingError: The base is not there, or none of our pipelines is for its kind.
    """
    from .. import pipelines

    with loading(f"the base model {base}"):
        named = str(DiffusionPipeline.load_config(os.fspath(base), **kwargs)["_class_name"])
    ours = {name.removeprefix("MoLE"): name for name in pipelines.__all__ if name.endswith("Pipeline")}
    if named not in ours:
        raise LoadingError(
            f"the base model {base} is for {printable(named, 100)}, beside which there is no pipeline of ours. "
            f"Give a base for one of {', '.join(ours)}."
        )
    found: type[MoLEPipelineMixin] = getattr(pipelines, ours[named])
    return found
