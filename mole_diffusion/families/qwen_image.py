"""Qwen-Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from .architecture import Architecture, Told, unit
from .base import Family
from .flux import words_then_pixels


class QwenImageTransformer(Architecture):
    """diffusers' ``QwenImageTransformer2DModel``: words and pixels have Linears of their own in every block and meet in
    its attention."""

    classes = ("QwenImageTransformer2DModel",)
    denoiser = True
    tokens = "pixels"
    vectors = frozenset({"time_text_embed", "img_mod", "txt_mod", "norm_out"})
    words = frozenset({"txt_in", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "txt_mlp"})
    blocks = unit(r"transformer_blocks\.\d+")
    layers = unit("attn|img_mlp|txt_mlp")
    order = (
        "img_in", "txt_in", "time_text_embed", "linear_1", "linear_2", "transformer_blocks", "img_mod", "txt_mod",
        "attn", "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out", "to_add_out",
        "img_mlp", "txt_mlp", "norm_out", "proj_out",
    )  # fmt: skip
    siblings = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    meeting = unit("attn")

    def told(self, model: nn.Module, given: Mapping[str, Any]) -> Told:
        mask = given.get("encoder_hidden_states_mask")
        return words_then_pixels(
            given, _grid(given.get("img_shapes")), mask.bool() if isinstance(mask, Tensor) else None
        )


def _grid(shapes: Any) -> tuple[int, int] | None:
    """Height and width in tokens, from ``(frames, height, width)`` of the pictures of each sample, its own first."""
    while isinstance(shapes, list) and shapes:
        shapes = shapes[0]
    return (int(shapes[1]), int(shapes[2])) if shapes else None


class QwenImage(Family):
    """A transformer of two streams; Qwen2.5-VL reads the text."""

    name = "qwen-image"
    title = "Qwen-Image"
    denoiser = "transformer"
    architectures: ClassVar[Mapping[str, Architecture]] = {"transformer": QwenImageTransformer()}
