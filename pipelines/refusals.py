"""What a call is refused for before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..drawable import check_drawable
from ..errors import MoLEError
from ..gating.folder import largest_number
from .selection import Selection


def refuse_half_measures(pipe: Any, loras: Selection, taking_part: Sequence[str], kwargs: Mapping[str, Any]) -> None:
    """Raises MoLEError where a picture would not be what the arguments say."""
    loaded = pipe._loaded
    if loras is not None and not taking_part and loaded.loras:
        active = pipe._active_adapters()
        if active:
            raise MoLEError(
                f"`loras={loras!r}` is the bare base model, and the adapters {', '.join(active)} of "
                "`load_lora_weights` draw too. Call `unload_lora_weights()` or `disable_lora()` first."
            )
    if kwargs.get("prompt_embeds") is not None and kwargs.get("prompt") is None:
        for name in taking_part:
            touched = loaded.loras[name].factors
            if all(component.startswith("text_encoder") for component in touched):
                raise MoLEError(
                    f"the LoRA {name!r} acts on the text encoder alone, and `prompt_embeds` were made before: it "
                    "would do nothing. Pass the prompt, or make the embeddings inside `with pipe.composing():` and "
                    f"draw with loras={[other for other in taking_part if other != name]}."
                )


def refuse_broken_gates(gates: Any) -> None:
    """Raises MoLEError for gates with NaN or huge numbers, as of a training that diverged: pictures would be black."""
    broken = [name for name, value in gates.named_parameters() if not (value.abs() <= largest_number(name)).all()]
    if broken:
        raise MoLEError(
            f"the gates have numbers that are not finite, or huge ({broken[0]}). Load them again, or train them with "
            "a lower learning rate."
        )


def refuse_not_finite(numbers: Mapping[str, Any]) -> None:
    """Raises MoLEError for a number, or a tensor that has one, which would make a black picture."""
    for name, value in numbers.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            one = torch.as_tensor(one) if isinstance(one, np.ndarray) and one.dtype.kind == "f" else one
            if isinstance(one, Tensor) and one.is_floating_point() and not one.isfinite().all():
                raise MoLEError(f"`{name}` must be finite, and has NaN or infinity.")
            if isinstance(one, Real):
                check_drawable(f"`{name}`", one)
