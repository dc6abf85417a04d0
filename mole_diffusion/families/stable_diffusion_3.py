"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from .architecture import Architecture, Told, spatial_size, unit
from .base import Family
from .clip import CLIPText
from .t5 import T5


class SD3Transformer(Architecture):
    """diffusers' ``SD3Transformer2DModel``: words and pixels have Linears of their own and meet in the attention."""

    classes = ("SD3Transformer2DModel",)
    denoiser = True
    tokens = "pixels"
    vectors = frozenset({"time_text_embed", "norm1", "norm1_context", "norm_out"})
    words = frozenset({"context_embedder", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context"})
    blocks = unit(r"transformer_blocks\.\d+")
    layers = unit("attn2?|ff|ff_context")
    order = (
        "pos_embed", "time_text_embed", "timestep_embedder", "text_embedder", "context_embedder", "transformer_blocks",
        "norm1", "norm1_context", "attn", "attn2", "ff", "ff_context",
        "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_out",
        "norm_out", "proj_out",
    )  # fmt: skip
    siblings = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")

    def told(self, model: nn.Module, given: Mapping[str, Any]) -> Told:
        sample = given["hidden_states"]
        size, patch = spatial_size(sample), model.config.patch_size
        return Told(
            rows=len(sample),
            timestep=given.get("timestep"),
            encoder_hidden_states=given.get("encoder_hidden_states"),
            sample_size=None if size is None else (size[0] // patch, size[1] // patch),
        )


class StableDiffusion3(Family):
    """A transformer of two streams; two CLIPs and T5 read the text."""

    name = "stable-diffusion-3"
    title = "Stable Diffusion 3 or 3.5"
    denoiser = "transformer"
    architectures: ClassVar[Mapping[str, Architecture]] = {
        "transformer": SD3Transformer(),
        "text_encoder": CLIPText(),
        "text_encoder_2": CLIPText(),
        "text_encoder_3": T5(),
    }
