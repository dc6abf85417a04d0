"""CLIP's text encoder."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from .architecture import Architecture, unit


class CLIPText(Architecture):
    """transformers' `CLIPTextModel` and `CLIPTextModelWithProjection`."""

    classes = ("CLIPTextModel", "CLIPTextModelWithProjection")
    blocks = unit(r"layers\.\d+")
    layers = unit("self_attn|mlp")
    order = (
        "text_model", "encoder", "layers", "layer_norm1", "self_attn", "layer_norm2", "mlp",
        "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "final_layer_norm", "text_projection",
    )  # fmt: skip
    siblings = (("q_proj", "k_proj", "v_proj"),)
    targets = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def layers_behind(model: Any, module: str) -> int | None:
    """How many layers of a text encoder come after that of a module; `None` of what is in none.

    Args:
        model: The text encoder.
        module: Name of the module.
    """
    layer = _LAYER.search(module)
    return None if layer is None else model.config.num_hidden_layers - 1 - int(layer[1])


NAMES = r"text_model|encoder_layers_\d"
"""Names of its modules, with underscores for dots."""


def clip_skeleton(hidden: int, layers: int, heads: int, *, projection: bool = False) -> nn.Module:
    """A CLIP text encoder of a published size."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=hidden,
    )
    model: nn.Module = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    return model
