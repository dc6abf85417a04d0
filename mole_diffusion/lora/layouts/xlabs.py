"""XLabs' keys for FLUX.1, whose trainer hangs its factors on attention processors."""

from __future__ import annotations

import re

from .slot import Slot

_KEY = re.compile(
    r"(?:diffusion_model\.)?(?P<block>(?:double|single)_blocks)\.(?P<index>\d+)\.processor"
    r"\.(?P<factors>(?:qkv|proj)_lora[12]?)\.(?P<part>down|up)\.weight"
)
# 1 is the picture's stream, 2 that of the words; a single block's factors make queries, keys and values of `linear1`.
_MODULES = {
    "double_blocks": {
        "qkv_lora1": "img_attn.qkv",
        "qkv_lora2": "txt_attn.qkv",
        "proj_lora1": "img_attn.proj",
        "proj_lora2": "txt_attn.proj",
    },
    "single_blocks": {"qkv_lora": "qkv", "proj_lora": "linear2"},
}


def xlabs(key: str) -> Slot | None:
    """`double_blocks.0.processor.qkv_lora1.down.weight`, `single_blocks.0.processor.proj_lora.up.weight`."""
    match = _KEY.fullmatch(key)
    module = _MODULES[match["block"]].get(match["factors"]) if match else None
    return (
        Slot("transformer", f"{match['block']}.{match['index']}.{module}", match["part"]) if match and module else None
    )


LAYOUTS = {"xlabs": xlabs}
