"""What a call is refused for before anything is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ..drawable import check_drawable
from ..errors import MoLEError
from ..families import Listening
from ..gating.folder import largest_number
from .selection import Selection

if TYPE_CHECKING:
    from ..gating import MoLEModel


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


def refuse_unheard(pipe: Any, given: Mapping[str, Any]) -> None:
    """Raises MoLEError where a call takes from its text encoders nothing of what a LoRA changes there.

    Args:
        pipe: The pipeline.
        given: The arguments of `encode_prompt`, by name.
    """
    unusual = given.get("clip_skip") is not None or given.get("pooled_prompt_embeds") is not None
    if given.get("prompt") is None or given.get("prompt_embeds") is not None or not unusual:
        return
    zeros = given.get("negative_prompt") is None and getattr(pipe.config, "force_zeros_for_empty_prompt", False)
    guided = given.get("do_classifier_free_guidance", True) and not zeros
    negative = guided and given.get("negative_prompt_embeds") is None
    summaries = [given.get("pooled_prompt_embeds")]
    summaries += [given.get("negative_pooled_prompt_embeds")] if negative else []
    listening = Listening(given.get("clip_skip") or 0, negative, any(one is None for one in summaries))
    loaded, family, components = pipe._loaded, pipe.family, pipe.lora_components
    for (name, lora), kept in zip(loaded.loras.items(), loaded.experts.keep.any(dim=0).tolist(), strict=True):
        touched = [(component, module) for component, modules in lora.factors.items() for module in modules]
        if kept and not any(family.is_read(components, *where, listening) for where in touched):
            raise MoLEError(
                f"the LoRA {name!r} acts on {'.'.join(touched[0])} and the like alone, and this call takes nothing of "
                "that from the text encoder (`clip_skip`, `pooled_prompt_embeds`): it would do nothing. Skip fewer "
                f"layers, or leave the LoRA out: `loras={[other for other in loaded.loras if other != name]}`."
            )


def refuse_broken_gates(gates: MoLEModel) -> None:
    """Raises MoLEError for gates with NaN or huge numbers, as of a training that diverged: pictures would be black."""
    of_kind: dict[str, list[Tensor]] = {}  # in few operators, since every call looks
    for gate in gates.gates.values():
        for kind, value in gate._parameters.items():
            if value is not None:
                of_kind.setdefault(kind, []).append(value)
    if all(get_total_norm(values, math.inf) <= largest_number(kind) for kind, values in of_kind.items()):
        return
    broken = [name for name, value in gates.named_parameters() if not (value.abs() <= largest_number(name)).all()]
    raise MoLEError(
        f"the gates have numbers that are not finite, or huge ({broken[0]}). Load them again, or train them with a "
        "lower learning rate."
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
