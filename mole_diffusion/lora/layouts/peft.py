"""Keys of one model alone: a bare PEFT adapter, or module names without any prefix, as DiffSynth writes them."""

from __future__ import annotations

import re

from .diffusers import owner_of
from .original import is_original
from .slot import PEFT_ENDINGS, Slot, take_ending

_PREFIX = "base_model.model."
# What PEFT trained whole: `modules_to_save`, and biases, whose modules have an adapter around them or not.
_WHOLE = re.compile(r"base_model\.model\.(?P<module>.+?)\.(?:weight|(?:base_layer\.)?(?P<bias>bias))")


def peft(key: str) -> Slot | None:
    """`base_model.model.<module>.lora_A.weight`, or the same without prefix.

    With it, also `base_model.model.<module>.weight` and `.bias`: what PEFT trained whole beside a LoRA.
    """
    if owner_of(key)[0] or is_original(key) or key.startswith(("lora_", "lycoris_")):
        return None
    found = take_ending(key.removeprefix(_PREFIX))
    if found:
        return Slot(None, *found)
    whole = None if "lora_" in key or ".base_layer.weight" in key else _WHOLE.fullmatch(key)
    return Slot(None, whole["module"], "diff_b" if whole["bias"] else "diff") if whole else None


def is_whole(key: str) -> bool:
    """Whether a key of a change says what the weight or bias is to be, and not by how much it changes."""
    return key.endswith((".weight", ".bias")) and "lora_" not in key and key.startswith(_PREFIX)


LAYOUTS = {"peft": peft}


def write(slot: Slot) -> str:
    """The key in an adapter of the slot's component."""
    return f"{_PREFIX}{slot.module}.{PEFT_ENDINGS.get(slot.part, slot.part)}"
