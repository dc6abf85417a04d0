"""FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from .architecture import Architecture, Joint, Told, unit
from .base import Family
from .clip import CLIPText
from .t5 import T5

TIMESTEPS = 1000  # the scheduler counts in thousands what the model is given as 0 to 1


class FluxTransformer(Architecture):
    """diffusers' ``FluxTransformer2DModel``: blocks with Linears of their own for words and pixels, then blocks of one
    sequence ``[words, pixels]``."""

    classes = ("FluxTransformer2DModel",)
    denoiser = True
    tokens = "pixels"
    vectors = frozenset({"time_text_embed", "norm", "norm1", "norm1_context", "norm_out"})
    words = frozenset({"context_embedder", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context"})
    both = frozenset({"single_transformer_blocks"})
    blocks = unit(r"(?:single_)?transformer_blocks\.\d+")
    layers = unit("attn|ff|ff_context")
    order = (
        "x_embedder", "time_text_embed", "context_embedder", "transformer_blocks", "single_transformer_blocks",
        "norm", "norm1", "norm1_context", "proj_mlp", "attn", "ff", "ff_context",
        "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out", "to_add_out",
        "norm_out", "proj_out",
    )  # fmt: skip
    siblings = (
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    )
    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")

    def told(self, model: nn.Module, given: Mapping[str, Any]) -> Told:
        sample, text, timestep = (given.get(key) for key in ("hidden_states", "encoder_hidden_states", "timestep"))
        assert isinstance(sample, Tensor)
        words = text.shape[1] if isinstance(text, Tensor) else 0
        return Told(
            rows=len(sample),
            timestep=None if timestep is None else timestep * TIMESTEPS,
            encoder_hidden_states=text,
            sample_size=_grid(given.get("img_ids")),
            joint=Joint(slice(0, words), slice(words, words + sample.shape[1])),
        )


def _grid(ids: Any) -> tuple[int, int] | None:
    """Height and width in tokens, from the place ``(_, row, column)`` of every token."""
    if not isinstance(ids, Tensor):
        return None
    height, width = (int(side) + 1 for side in ids.reshape(-1, ids.shape[-1])[:, 1:3].amax(dim=0).tolist())
    return height, width


class Flux(Family):
    """A transformer of two streams, then of one; CLIP gives one vector for the text, T5 its words."""

    name = "flux"
    title = "FLUX.1"
    denoiser = "transformer"
    architectures: ClassVar[Mapping[str, Architecture]] = {
        "transformer": FluxTransformer(),
        "text_encoder": CLIPText(),
        "text_encoder_2": T5(),
    }
