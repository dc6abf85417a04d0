"""Which family of base models a LoRA was trained for, guessed from the width of the text it attends to."""

from __future__ import annotations

import re
from collections.abc import Iterable

_CROSS_ATTENTION = re.compile(r"attn2[._]to_[kv]$")
_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}


def text_width(widths: Iterable[tuple[str, int]]) -> int | None:
    """Input width of the first cross-attention key or value among `(module name, input width)` pairs."""
    return next((width for name, width in widths if _CROSS_ATTENTION.search(name)), None)


def family(width: int | None) -> str:
    """Name of the family whose cross-attention has this input width."""
    return _FAMILIES.get(width, "unknown") if width is not None else "unknown"


def family_hint(file_width: int | None, model_width: int | None) -> str:
    """A sentence for an error message where file and model plainly come from different families; else empty."""
    if file_width is None or model_width is None or file_width == model_width:
        return ""
    return (
        f"The file looks like {family(file_width)} (its cross-attention expects text of width {file_width}); "
        f"this model's expects {model_width}. "
    )
