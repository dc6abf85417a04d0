"""Each LoRA alone, their plain sum, and what is asked for, from the same noise."""

from __future__ import annotations

from dataclasses import replace

from ..drawing.settings import PictureSettings
from ..errors import MoLEError


def comparison(settings: PictureSettings) -> list[tuple[str, PictureSettings]]:
    """Settings of the pictures of a comparison, each with its label.

    Raises:
        MoLEError: Fewer than two LoRAs are on.
    """
    on = [lora.name for lora in settings.loras if lora.on]
    if len(on) < 2:
        raise MoLEError("a comparison needs two LoRAs that are on. Switch on more, or draw.")
    plain = replace(settings, gates=None, composition="linear", composition_options={}, regions={})
    alone = [
        (f"{name} alone", replace(plain, loras=tuple(replace(own, on=own.name == name) for own in settings.loras)))
        for name in on
    ]
    return [*alone, ("sum", plain), ("this", settings)]
