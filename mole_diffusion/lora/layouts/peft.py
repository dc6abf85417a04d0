"""Keys of one model alone: a bare PEFT adapter, or module names without any prefix, as DiffSynth writes them."""

from __future__ import annotations

from .diffusers import owner_of
from .original import is_original
from .place import PEFT_ENDINGS, Place, take_ending

_PREFIX = "base_model.model."


def peft(key: str) -> Place | None:
    """`base_model.model.<module>.lora_A.weight`, or the same without prefix."""
    if owner_of(key)[0] or is_original(key) or key.startswith(("lora_", "lycoris_")):
        return None
    found = take_ending(key.removeprefix(_PREFIX))
    return Place(None, *found) if found else None


def write(place: Place) -> str:
    """The key in an adapter of the place's component."""
    return f"{_PREFIX}{place.module}.{PEFT_ENDINGS.get(place.part, place.part)}"
