"""The prompt, the size and the files of pictures, as `mole generate` reads them from the command line."""

from __future__ import annotations

import re
from pathlib import Path

from mole_diffusion.errors import MoLEError

LARGEST_SIDE = 2**14  # pixels
WEBUI_LORA = re.compile(r"<(?:lora|lyco):[^>]*>", re.IGNORECASE)


def read_prompt(prompt: str) -> str:
    """The prompt.

    Raises:
        MoLEError: It is empty, or asks for a LoRA as the WebUI of Automatic1111 does, which would be read as words.
    """
    if not prompt.strip():
        raise MoLEError('--prompt is empty. Say what to draw: --prompt "a photo of a cat on grass".')
    found = WEBUI_LORA.search(prompt)
    if found:
        raise MoLEError(
            f"--prompt has {found.group()}, which would be read as words here. Take it out, and give the LoRA and its "
            "strength as --lora cat=cat.safetensors:0.8."
        )
    return prompt


def read_size(height: int | None, width: int | None) -> None:
    """Raises MoLEError unless both are multiples of 8, as autoencoders want them, and no more than can be drawn."""
    for option, size in (("--height", height), ("--width", width)):
        if size is not None and size > LARGEST_SIDE:
            raise MoLEError(f"{option} {size}: must be at most {LARGEST_SIDE}.")
        if size is not None and size % 8:
            raise MoLEError(f"{option} {size}: must be a multiple of 8, such as {max(8, size // 8 * 8)}.")


def output_files(out: Path, count: int) -> list[Path]:
    """Where `count` pictures go: `out` itself, or picture-0.png, picture-1.png … for picture.png.

    Raises:
        MoLEError: Pictures cannot be written in the format of the suffix.
    """
    from mole_diffusion.pictures import refuse_ending

    try:
        refuse_ending(out)
    except MoLEError as error:
        raise MoLEError(f"--out {error}") from None
    return [out] if count == 1 else [out.with_name(f"{out.stem}-{index}{out.suffix}") for index in range(count)]
