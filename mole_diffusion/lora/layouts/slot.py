"""What a key of a LoRA file says about itself: which model, which module, and what its tensor is there."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..kinds import KINDS


@dataclass(frozen=True)
class Slot:
    """Where one tensor of a file belongs.

    Attributes:
        component: Model; None where the key does not say.
        module: The module's name as the file spells it: with dots, or with underscores in their place.
        part: What the tensor is: `"down"`, `"up"`, `"mid"`, `"alpha"`, `"magnitude"` (DoRA in PEFT's words),
            `"dora_scale"` (in kohya's), `"up_bias"`, `"diff"`, `"diff_b"`, `"hada_…"`,
            `"lokr_…"`, or `"scale_of_down"` and the like: what the numbers of another part are to be multiplied by.
    """

    component: str | None
    module: str
    part: str


# PEFT puts the name of the adapter between; other programs do not.
_FACTORS = re.compile(
    r"(?P<stem>.+)\.lora_(?P<which>A|B|down|up|mid)(?:\.(?!weight\.)[^.]+)?"
    r"\.(?P<what>weight|bias|scale_weight|weight_scale)"
)
_MAGNITUDE = re.compile(r"(?P<stem>.+)\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?")
_WHICH = {"A": "down", "B": "up", "down": "down", "up": "up", "mid": "mid"}
_BESIDE = {"alpha", "dora_scale", "diff_b"}
_OF_NORMS = {"w_norm": "diff", "b_norm": "diff_b"}  # LyCORIS' names of the same at a normalisation layer
_WHOLE = (_BESIDE | {part for kind in KINDS for part in kind.takes}) - set(_WHICH.values())
"""Parts that are their own ending, those of a new kind among them."""
_OTHERS = re.compile(rf"(?P<stem>.+)\.(?P<part>{'|'.join(sorted(_WHOLE | set(_OF_NORMS)))})(?:\.default)?")


def take_ending(key: str) -> tuple[str, str] | None:
    """A key's stem and the part its ending names, in any program's words; None for another key.

    Programs mix endings and stems freely, so endings are read in one place for all layouts.
    """
    if match := _FACTORS.fullmatch(key):
        part = _WHICH[match["which"]]
        if match["what"] == "weight":
            return match["stem"], part
        if match["what"] == "bias":
            return (match["stem"], "up_bias") if part == "up" else None
        return match["stem"], f"scale_of_{part}"
    if match := _MAGNITUDE.fullmatch(key):
        return match["stem"], "magnitude"
    if match := _OTHERS.fullmatch(key):
        return match["stem"], _OF_NORMS.get(match["part"], match["part"])
    return None


PEFT_ENDINGS = {
    "down": "lora_A.weight",
    "up": "lora_B.weight",
    "up_bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}
KOHYA_ENDINGS = {
    "down": "lora_down.weight",
    "up": "lora_up.weight",
    "mid": "lora_mid.weight",
    "scale_of_down": "lora_down.scale_weight",
    "scale_of_up": "lora_up.scale_weight",
    "scale_of_mid": "lora_mid.scale_weight",
}
"""Endings by part, for writing; a part that is not there is its own ending."""
