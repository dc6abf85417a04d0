"""Keys of one model alone: a bare PEFT adapter, or module names without any prefix, as DiffSynth writes them."""

from __future__ import annotations

from .diffusers import owner_of
from .original import is_original
from .slot import PEFT_ENDINGS, Slot, take_ending

_PREFIX = "base_model.model."


def peft(key: str) -> Slot | None:
    """`base_model.model.<module>.lora_A.weight`, or the same without prefix."""
    if owner_of(key)[0] or is_original(key) or key.startswith(("lora_", "lycoris_")):
        return None
    found = take_ending(key.removeprefix(_PREFIX))
    return Slot(None, *found) if found else None


LAYOUTS = {"peft": peft}


def write(slot: Slot) -> str:
    """The key in an adapter of the slot's component."""
    return f"{_PREFIX}{slot.module}.{PEFT_ENDINGS.get(slot.part, slot.part)}"
