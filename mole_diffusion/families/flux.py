"""FLUX.1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .architecture import Architecture, Joint, Told, packed_grid, unit
from .base import Conditions, Family, Text
from .clip import NAMES as CLIP_NAMES
from .clip import CLIPText, clip_skeleton
from .latents import from_patches, latent_side, positions, size_shift, to_patches
from .skeleton import DIFFUSERS_BLOCKS, Components, Skeleton
from .t5 import NAMES as T5_NAMES
from .t5 import T5, t5_skeleton
from .together import Together, behind, whose

GUIDANCE = 3.5  # that models of embedded guidance are told where nobody says another, as in diffusers
TIMESTEPS = 1000  # the scheduler counts in thousands what the model is given as 0 to 1

# The authors' names in a block with Linears of its own for words and pixels, and ours; FLUX.2 has them too.
DOUBLE_ATTENTION = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
}

SINGLE_NORMS = {
    "single_blocks.*.norm.query_norm": ("single_transformer_blocks.*.attn.norm_q",),
    "single_blocks.*.norm.key_norm": ("single_transformer_blocks.*.attn.norm_k",),
}

NAMES = rf"double_blocks_\d|single_blocks_\d|single_transformer_blocks_\d|stream_modulation|{DIFFUSERS_BLOCKS}"
"""Names of modules of FLUX.1 and FLUX.2, with underscores for dots."""


class FluxTransformer(Architecture):
    """diffusers' `FluxTransformer2DModel`.

    Blocks with Linears of their own for words and pixels, then blocks of one sequence `[words, pixels]`.
    """

    classes = ("FluxTransformer2DModel",)
    denoiser = True
    tokens = "pixels"
    vectors = frozenset({"time_text_embed", "norm", "norm1", "norm1_context", "norm_out"})
    words = frozenset(
        {
            "context_embedder", "add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "to_add_out",
            "ff_context",
        }
    )  # fmt: skip
    both = frozenset({"single_transformer_blocks"})
    blocks = unit(r"(?:single_)?transformer_blocks\.\d+")
    layers = unit("attn|ff|ff_context")
    order = (
        "x_embedder", "time_text_embed", "context_embedder", "transformer_blocks", "single_transformer_blocks",
        "norm", "norm1", "norm1_context", "proj_mlp", "attn", "ff", "ff_context",
        "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj",
        "norm_q", "norm_k", "norm_added_q", "norm_added_k", "to_out", "to_add_out", "norm_out", "proj_out",
    )  # fmt: skip
    siblings = (
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    )
    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    meeting = unit("attn")
    heads = 2
    originals: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
        "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
        "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
        **{
            f"double_blocks.*.{theirs}": tuple(f"transformer_blocks.*.{name}" for name in ours)
            for theirs, ours in {
                **DOUBLE_ATTENTION,
                "img_mlp.0": ("ff.net.0.proj",),
                "img_mlp.2": ("ff.net.2",),
                "txt_mlp.0": ("ff_context.net.0.proj",),
                "txt_mlp.2": ("ff_context.net.2",),
                "img_mod.lin": ("norm1.linear",),
                "txt_mod.lin": ("norm1_context.linear",),
            }.items()
        },
        "single_blocks.*.linear1": tuple(
            f"single_transformer_blocks.*.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ),
        # XLabs' trainer has factors for this part of `linear1` alone.
        "single_blocks.*.qkv": tuple(f"single_transformer_blocks.*.attn.{name}" for name in ("to_q", "to_k", "to_v")),
        "single_blocks.*.linear2": ("single_transformer_blocks.*.proj_out",),
        **SINGLE_NORMS,
        "single_blocks.*.modulation.lin": ("single_transformer_blocks.*.norm.linear",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    }
    exchanged = frozenset({"norm_out.linear"})

    def told(self, model: nn.Module, given: Mapping[str, Any]) -> Told:
        return words_then_pixels(given, packed_grid(given.get("img_ids")))


def words_then_pixels(
    given: Mapping[str, Any], grid: tuple[int, int] | None, words: Tensor | None = None, cache: str | None = None
) -> Told:
    """Reads a call of a transformer that joins the prompt and the packed latents as `[words, pixels]`.

    Args:
        given: Arguments by name, with diffusers' names for the latents, the prompt and the step.
        grid: Height and width of the picture in tokens. More tokens may follow: pictures to look at.
        words: As in `Told`.
        cache: As in `Told`.
    """
    sample, text, timestep = (given.get(key) for key in ("hidden_states", "encoder_hidden_states", "timestep"))
    assert isinstance(sample, Tensor)
    first = text.shape[1] if isinstance(text, Tensor) else 0
    pixels = sample.shape[1] if grid is None else grid[0] * grid[1]
    return Told(
        rows=len(sample),
        timestep=None if timestep is None else timestep * TIMESTEPS,
        encoder_hidden_states=text,
        sample_size=grid,
        joint=Joint(slice(0, first), slice(first, first + pixels)),
        words=words,
        cache=cache,
    )


def _published() -> Components:
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(guidance_embeds=True)
    return {"transformer": transformer, "text_encoder": clip_skeleton(768, 12, 12), "text_encoder_2": t5_skeleton()}


class Flux(Family):
    """A transformer of two streams, then of one; CLIP gives one vector for the text, T5 its words."""

    name = "flux"
    title = "FLUX.1"
    denoiser = "transformer"
    patch = 2
    architectures: ClassVar[Mapping[str, Architecture]] = {
        "transformer": FluxTransformer(),
        "text_encoder": CLIPText(),
        "text_encoder_2": T5(),
    }
    skeletons = (Skeleton("FLUX.1", rf"{NAMES}|{CLIP_NAMES}|{T5_NAMES}", _published),)
    # CLIP gives one vector of the whole prompt.
    texts = (Text(stretch=None), Text("tokenizer_2", "prompt_2", limit=("max_sequence_length", 512)))

    def encode(self, pipe: Any, prompts: list[str], device: Any, **limits: int) -> Any:
        return pipe.encode_prompt(prompts, None, device=device, **limits)

    def together(self, encoded: Any, others: Sequence[Any]) -> Together:
        embeds, pooled, places = encoded
        further = [other[0] for other in others]
        places = torch.cat([places, *(other[2] for other in others)])
        return Together((behind(embeds, further), pooled, places), whose(embeds, further))

    def conditions(self, pipe: Any, prompts: list[str]) -> Conditions:
        embeds, pooled, _ = self.encode(pipe, prompts, pipe.transformer.device)
        return Conditions(embeds, {"pooled_projections": pooled})

    def latent_shape(self, pipe: Any) -> tuple[int, ...]:
        return ((latent_side(pipe) // 2) ** 2, pipe.transformer.config.in_channels)

    def latents(self, pipe: Any, encoded: Tensor) -> Tensor:
        return to_patches(super().latents(pipe, encoded))

    def shift(self, pipe: Any) -> float | None:
        return size_shift(pipe, self.latent_shape(pipe)[0])

    def predict(self, pipe: Any, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        side = math.isqrt(latents.shape[1])
        guided = pipe.transformer.config.guidance_embeds
        prediction: Tensor = pipe.transformer(
            hidden_states=latents,
            timestep=timesteps / TIMESTEPS,
            guidance=latents.new_full((len(latents),), GUIDANCE, dtype=torch.float32) if guided else None,
            encoder_hidden_states=conditions.prompt_embeds,
            txt_ids=latents.new_zeros(conditions.prompt_embeds.shape[1], 3),
            img_ids=positions(side, side, 3, latents),
            return_dict=False,
            **conditions.others,
        )[0]
        return prediction

    def picture(self, pipe: Any, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return super().picture(pipe, from_patches(latents, grid))
