"""CLIP's text encoder."""

from __future__ import annotations

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
