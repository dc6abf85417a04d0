"""diffusers' own keys, today's and those of its first year."""

from __future__ import annotations

import re

from mole_diffusion.families import COMPONENTS

from .slot import PEFT_ENDINGS, Slot, take_ending

_OWNER = re.compile(
    rf"(?:base_model\.model\.)?(?P<component>{'|'.join(COMPONENTS)})\.(?:base_model\.model\.)?(?P<rest>.+)"
)
_OLD_ATTENTION = re.compile(
    r"(?P<parent>.+?)(?:\.processor)?\.(?P<leaf>to_\w+|\w+_proj)_lora\.(?P<part>down|up)\.weight"
)
_OLD_LINEAR = re.compile(r"(?P<module>.+)\.lora(?:_linear_layer)?\.(?P<part>down|up)\.weight")
# In the oldest files the text encoder's projections carry the names of the UNet's.
_OLD_TEXT_ENCODER_LEAVES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def owner_of(key: str) -> tuple[str | None, str]:
    """The component in front of a key, and the rest of it."""
    match = _OWNER.fullmatch(key)
    return (match["component"], match["rest"]) if match else (None, key)


def diffusers(key: str) -> Slot | None:
    """`unet.<module>.lora_A.weight`, `text_encoder.<module>.lora_B.weight`: what diffusers and PEFT write today.

    OneTrainer and DiffSynth put other endings behind the same names, so any is read.
    """
    component, rest = owner_of(key)
    found = take_ending(rest) if component else None
    return Slot(component, *found) if found else None


def diffusers_old(key: str) -> Slot | None:
    """`unet.….attn1.processor.to_q_lora.down.weight`, `….lora_linear_layer.up.weight`, `….lora.down.weight`.

    What diffusers wrote until 2023; keys without a component are those of `unet.save_attn_procs`.
    """
    component, rest = owner_of(key)
    if match := _OLD_LINEAR.fullmatch(rest):
        return Slot(component, match["module"], match["part"])
    if not (match := _OLD_ATTENTION.fullmatch(rest)):
        return None
    parent, leaf = match["parent"], match["leaf"]
    if parent.endswith("self_attn"):
        leaf = _OLD_TEXT_ENCODER_LEAVES.get(leaf, leaf)
    elif leaf == "to_out":
        leaf = "to_out.0"
    return Slot(component, f"{parent}.{leaf}", match["part"])


LAYOUTS = {"diffusers": diffusers, "diffusers-old": diffusers_old}


def write(slot: Slot) -> str:
    """The key of today's layout."""
    return f"{slot.component}.{slot.module}.{PEFT_ENDINGS.get(slot.part, slot.part)}"
