"""The `loras` argument of a pipeline call, read strictly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..choices import check_names
from ..drawable import check_drawable

Selection = Mapping[str, float] | Sequence[str] | None


def read_selection(loras: Selection, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Turns a choice of LoRAs into a mask and scales.

    Args:
        loras: `None` for all, a list of the names to keep, or a mapping of them to scales.
        names: The loaded LoRAs, in the order of the experts.

    Returns:
        `keep` and `scale`, both float32 `(1, num_experts)`. `keep` is all zero for an empty choice.

    Raises:
        TypeError: `loras` is of another type, a name is no string, or a scale is no number.
        MoLEError: A name is not loaded or is given twice, or a scale is not finite.
    """
    keep, scale = torch.ones(1, len(names)), torch.ones(1, len(names))
    if loras is None:
        return keep, scale
    if isinstance(loras, bool | str | bytes) or not isinstance(loras, Mapping | list | tuple):
        raise TypeError(
            f"`loras` must be None (all), a list of names, or a dict of name to scale, got {_shown(loras)}."
            + (f" For one LoRA pass loras=[{loras!r}]." if isinstance(loras, str) else "")
        )
    check_names(loras, names, "loras")
    keep.zero_()
    for name in loras:
        weight = float(np.float32(_lora_scale(name, loras[name]))) if isinstance(loras, Mapping) else 1.0
        # A LoRA at 0, or what float32 takes for it, is left out, so that the others share what it would have had.
        keep[0, names.index(name)] = weight != 0
        scale[0, names.index(name)] = weight or 1.0
    return keep, scale


# Where pipelines of diffusers take the `scale` of all LoRAs.
SCALE_ARGUMENTS = ("cross_attention_kwargs", "attention_kwargs", "joint_attention_kwargs")


def read_scale(kwargs: Mapping[str, Any]) -> float:
    """The `scale` of all LoRAs in the arguments of a pipeline's call; 1 where none is given.

    Raises:
        TypeError: It is no number.
        MoLEError: It is not finite.
    """
    for name in SCALE_ARGUMENTS:
        given = kwargs.get(name)
        if given and given.get("scale") is not None:
            scale: float = given["scale"]
            if not isinstance(scale, Real | Tensor):
                raise TypeError(f"`{name}['scale']` must be a number, got {_shown(scale)}.")
            check_drawable(f"`{name}['scale']`", scale)
            return scale
    return 1.0


def _lora_scale(name: str, scale: object) -> float:
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"the scale of {name!r} in `loras` must be a number, got {_shown(scale)}.")
    check_drawable(f"the scale of {name!r} in `loras`", scale)
    return float(scale)


def _shown(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"
