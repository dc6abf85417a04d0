"""Key layouts: what a key of a LoRA file says about itself.

A layout is one function, key in, `Place` out, or `None` where the key is not its own. It needs no model; which module
of a model a place means is decided in `modules.py`. A new layout is one function and one entry of `LAYOUTS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from mole_diffusion.families import COMPONENTS

Kind = Literal["down", "up", "alpha"]

_COMPONENT = "|".join(COMPONENTS)


@dataclass(frozen=True)
class Place:
    """Where one tensor of a file belongs: component (None where the key does not say), module as spelt there, kind."""

    component: str | None
    module: str
    kind: Kind


_PEFT_KEY = re.compile(r"(?P<module>.+)\.(?:lora_(?P<kind>[AB])(?:\.[^.]+)?\.weight|alpha)")
_OWNER = re.compile(rf"(?P<component>{_COMPONENT})\.(?:base_model\.model\.)?(?P<module>.+)")
_OLD_ATTENTION = re.compile(r"(?P<parent>.+?)(?:\.processor)?\.(?P<leaf>\w+)_lora\.(?P<kind>down|up)\.weight")
_OLD_LINEAR = re.compile(r"(?P<module>.+)\.lora(?:_linear_layer)?\.(?P<kind>down|up)\.weight")
_KOHYA_KEY = re.compile(r"lora_(?P<owner>unet|te[123]?)_(?P<module>[^.]+)\.(?:lora_(?P<kind>down|up)\.weight|alpha)")

_KINDS: dict[str | None, Kind] = {"A": "down", "B": "up", "down": "down", "up": "up", None: "alpha"}
_KOHYA_OWNERS = {
    "unet": "unet",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
}
# In the oldest files the text encoder's projections carry the names of the UNet's.
_OLD_TEXT_ENCODER_LEAVES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def diffusers(key: str) -> Place | None:
    """`unet.<module>.lora_A.weight`, `text_encoder.<module>.lora_B.weight`: what diffusers and PEFT write today."""
    owner = _OWNER.fullmatch(key)
    match = _PEFT_KEY.fullmatch(owner["module"]) if owner else None
    return Place(owner["component"], match["module"], _KINDS[match["kind"]]) if owner and match else None


def peft(key: str) -> Place | None:
    """`base_model.model.<module>.lora_A.weight`, or the same without prefix: a bare PEFT adapter of one model."""
    if _OWNER.fullmatch(key):
        return None
    match = _PEFT_KEY.fullmatch(key.removeprefix("base_model.model."))
    return Place(None, match["module"], _KINDS[match["kind"]]) if match else None


def diffusers_old(key: str) -> Place | None:
    """`unet.….attn1.processor.to_q_lora.down.weight`, `….lora_linear_layer.up.weight`, `….lora.down.weight`.

    What diffusers wrote until 2023; keys without a component are those of `unet.save_attn_procs`.
    """
    owner = _OWNER.fullmatch(key)
    component, rest = (owner["component"], owner["module"]) if owner else (None, key)
    if match := _OLD_LINEAR.fullmatch(rest):
        return Place(component, match["module"], _KINDS[match["kind"]])
    if not (match := _OLD_ATTENTION.fullmatch(rest)):
        return None
    parent, leaf = match["parent"], match["leaf"]
    if parent.endswith("self_attn"):
        leaf = _OLD_TEXT_ENCODER_LEAVES.get(leaf, leaf)
    elif leaf == "to_out":
        leaf = "to_out.0"
    return Place(component, f"{parent}.{leaf}", _KINDS[match["kind"]])


def kohya(key: str) -> Place | None:
    """`lora_unet_<module with underscores>.lora_down.weight`, `lora_te_…`, `lora_te1_…`, `lora_te2_…`, `.alpha`."""
    match = _KOHYA_KEY.fullmatch(key)
    return Place(_KOHYA_OWNERS[match["owner"]], match["module"], _KINDS[match["kind"]]) if match else None


LAYOUTS: dict[str, Callable[[str], Place | None]] = {
    "diffusers": diffusers,
    "peft": peft,
    "diffusers-old": diffusers_old,
    "kohya": kohya,
}


def place_keys(keys: Iterable[str]) -> tuple[str | None, dict[str, Place], list[str]]:
    """The layout that understands most keys, what it says of each, and the keys it does not understand.

    A few `.alpha` keys fit several layouts, hence the count. The layout is `None` where no key is understood.
    """
    ordered = sorted(keys)
    best: tuple[str | None, dict[str, Place]] = (None, {})
    for name, layout in LAYOUTS.items():
        places = {key: place for key in ordered if (place := layout(key)) is not None}
        if len(places) > len(best[1]):
            best = (name, places)
    return best[0], best[1], [key for key in ordered if key not in best[1]]
