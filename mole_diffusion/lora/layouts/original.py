"""Names of the model authors' own code, dotted, as ComfyUI, ai-toolkit and the reference trainers write them."""

from __future__ import annotations

import re

from .kohya import kohya
from .slot import Slot, take_ending

_DENOISER = re.compile(r"(?:base_model\.model\.)?(?:model\.)?diffusion_model\.(?P<module>.+)")
_UNDERSCORED = re.compile(r"lora_unet_diffusion_model_(?P<module>[^.]+)")
_TEXT_ENCODER = re.compile(r"(?:text_encoders\.)?(?P<name>clip_l|clip_g|t5xxl)\.(?:transformer\.)?(?P<module>.+)")
_TEXT_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}


def is_original(key: str) -> bool:
    """Whether a key has a prefix that only this layout has."""
    return any(pattern.match(key) for pattern in (_DENOISER, _UNDERSCORED, _TEXT_ENCODER))


def original(key: str) -> Slot | None:
    """`diffusion_model.<module>.lora_A.weight`, with any ending; text encoders as ComfyUI or kohya name them."""
    found = take_ending(key)
    if not found:
        return None
    stem, part = found
    if match := _DENOISER.fullmatch(stem) or _UNDERSCORED.fullmatch(stem):
        return Slot("unet", match["module"], part)
    if match := _TEXT_ENCODER.fullmatch(stem):
        return Slot(_TEXT_ENCODERS[match["name"]], match["module"], part)
    return kohya(key) if stem.startswith("lora_te") else None


LAYOUTS = {"original": original}
