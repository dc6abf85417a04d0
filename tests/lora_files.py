"""LoRA files of every layout made from one state dict: shared by LoRA tests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.lora import LoRA
from tests.tiny import random_lora

CLIP = "text_model."
QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
KEY = QUERY.replace("to_q", "to_k")
CONV = "unet.mid_block.resnets.0.conv1"
State = dict[str, Tensor]


def split(key: str) -> tuple[str, str, str]:
    """Component, module and ending of a key of `tests.tiny.random_lora`."""
    component, rest = key.split(".", 1)
    ending = next(e for e in (".lora_A.weight", ".lora_B.weight", ".alpha") if rest.endswith(e))
    return component, rest.removesuffix(ending), ending


def to_kohya(state: Mapping[str, Tensor], text_encoder: str = "te") -> dict[str, Tensor]:
    """`lora_unet_….lora_down.weight`, `lora_te_text_model_….lora_up.weight`, `….alpha`."""
    endings = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight", ".alpha": ".alpha"}
    owners = {"unet": "lora_unet_", "text_encoder": f"lora_{text_encoder}_text_model_"}
    return {
        owners[component] + module.replace(".", "_") + endings[ending]: value
        for (component, module, ending), value in ((split(key), value) for key, value in state.items())
    }


def to_old(state: Mapping[str, Tensor], old_text_encoder: bool = False) -> dict[str, Tensor]:
    """Keys as diffusers wrote them until 2023; `old_text_encoder` spells the text encoder's as in its first months."""
    parts = {".lora_A.weight": ".down.weight", ".lora_B.weight": ".up.weight"}
    first = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}
    result = {}
    for key, value in state.items():
        component, module, ending = split(key)
        part = parts[ending]
        if component == "text_encoder":
            parent, leaf = module.rsplit(".", 1)
            if old_text_encoder and leaf in first:
                result[f"text_encoder.{CLIP}{parent}.{first[leaf]}{part}"] = value
            else:
                result[f"text_encoder.{CLIP}{module}.lora_linear_layer{part}"] = value
        elif ".attn" in module:
            module = module.removesuffix(".0")
            parent, leaf = module.rsplit(".", 1)
            result[f"unet.{parent}.processor.{leaf}_lora{part}"] = value
        else:
            result[f"unet.{module}.lora{part}"] = value
    return result


def to_peft(state: Mapping[str, Tensor], component: str, prefix: str = "base_model.model.") -> dict[str, Tensor]:
    """One component's keys as a bare PEFT adapter of that model has them."""
    return {
        prefix + key.removeprefix(f"{component}."): v for key, v in state.items() if key.startswith(f"{component}.")
    }


def same_factors(one: LoRA, other: LoRA) -> None:
    """Asserts that two LoRAs hold the same factors, bit for bit, and the same scalings."""
    assert one.factors.keys() == other.factors.keys()
    for component in one.factors:
        assert one.factors[component].keys() == other.factors[component].keys()
        for name, factors in one.factors[component].items():
            twin = other.factors[component][name]
            assert torch.equal(factors.down, twin.down), name
            assert torch.equal(factors.up, twin.up), name
            assert factors.scaling == twin.scaling, name


def stock_deltas(model: nn.Module) -> dict[str, Tensor]:
    """What peft's layers in a model add to each weight, by module name without peft's own levels."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name: module.get_delta_weight(module.active_adapters[0]).detach()
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def breakable(models: Mapping[str, Any]) -> State:
    """A good LoRA to break: two attention projections, a convolution, one text-encoder module."""
    targets = [rf"{re.escape(QUERY)}$", rf"{re.escape(KEY)}$", rf"{re.escape(CONV)}$", "text_encoder.*0.mlp.fc1$"]
    return random_lora(models, targets=targets)
