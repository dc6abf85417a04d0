"""kohya's keys (sd-scripts, musubi-tuner), and those of OneTrainer and LyCORIS, which are built alike."""

from __future__ import annotations

import re

from .slot import KOHYA_ENDINGS, Slot, take_ending

_STEM = re.compile(
    r"(?:lora_(?P<owner>unet|transformer|te[123]?)|(?P<lycoris>lycoris))_(?P<module>(?!diffusion_model_)[^.]+)"
)
# `lora_unet_` is in front of the denoiser's modules also where that is a transformer.
_COMPONENTS = {
    "unet": "unet",
    "transformer": "transformer",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
}
OWNERS = {"unet": "unet", "transformer": "unet", "text_encoder_2": "te2", "text_encoder_3": "te3"}


def kohya(key: str) -> Slot | None:
    """`lora_unet_<module with underscores>.lora_down.weight`, `lora_te1_…`, `lora_transformer_…`, `lycoris_…`."""
    found = take_ending(key)
    match = _STEM.fullmatch(found[0]) if found else None
    if not found or not match:
        return None
    return Slot(_COMPONENTS.get(match["owner"]), match["module"], found[1])


LAYOUTS = {"kohya": kohya}


def write(slot: Slot, first_of_several: bool = False) -> str:
    """The key.

    Args:
        slot: What to write; its component must be known.
        first_of_several: Whether the file has a second text encoder, so that the first is `te1`.
    """
    component = str(slot.component)
    owner = OWNERS.get(component, "te1" if first_of_several else "te")
    module = slot.module.replace(".", "_")
    return f"lora_{owner}_{module}.{KOHYA_ENDINGS.get(slot.part, slot.part)}"
