"""The model card beside gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mole_diffusion.errors import MoLEError, printable
from mole_diffusion.reading import read_text

from .config import GateConfig

CARD = "README.md"
LIBRARY = "library_name: mole_diffusion"


def card_of(loras: Sequence[Mapping[str, Any]], config: GateConfig) -> str:
    """A model card for gates that have none of their own yet."""
    names = [printable(lora["name"]) for lora in loras]
    return "\n".join(
        [
            "---",
            LIBRARY,
            "tags: [lora, mixture-of-lora-experts]",
            "---",
            "",
            f"# Gates for {' + '.join(names)}",
            "",
            "Gates of [Mixture of LoRA Experts](https://openreview.net/forum?id=uWvKBCYh4S) for `mole_diffusion`. "
            "They weigh exactly these LoRAs, in this order:",
            "",
            *(
                f"- {name}: ranks {lora['ranks'][0]} to {lora['ranks'][1]}, factors of SHA-256 {lora['sha256']}"
                for name, lora in zip(names, loras, strict=True)
            ),
            "",
            "```python",
            f"pipe.load_loras({{{', '.join(f'{name!r}: ...' for name in names)}}})",
            "pipe.load_gates(folder)",
            "```",
            "",
            "Settings: " + ", ".join(f"`{name}={value}`" for name, value in config.to_dict().items()) + ".",
            "",
        ]
    )


def own_card(folder: Path) -> str | None:
    """The model card of a folder, if it is one of this library's."""
    try:
        text = read_text(folder / CARD)
    except MoLEError:
        return None
    return text if LIBRARY in text.splitlines()[:20] else None
