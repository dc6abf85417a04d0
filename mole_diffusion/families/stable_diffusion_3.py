"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .architecture import Architecture, Joint, Original, Told, last_of, spatial_size, unit
from .base import Conditions, Family, Text
from .clip import NAMES as CLIP_NAMES
from .clip import CLIPText, clip_skeleton
from .skeleton import DIFFUSERS_BLOCKS, Components, Skeleton
from .t5 import NAMES as T5_NAMES
from .t5 import T5, t5_skeleton
from .together import NOBODY, PROMPT, Together, behind, whose

_NAMES = rf"joint_blocks_\d|{DIFFUSERS_BLOCKS}|{CLIP_NAMES}|{T5_NAMES}"


class SD3Transformer(Architecture):
    """diffusers' `SD3Transformer2DModel`: words and pixels have Linears of their own and meet in the attention."""

    classes = ("SD3Transformer2DModel",)
    denoiser = True
    tokens = "pixels"
    vectors = frozenset({"time_text_embed", "norm1", "norm1_context", "norm_out"})
    words = frozenset(
        {
            "context_embedder", "add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "to_add_out",
            "ff_context",
        }
    )  # fmt: skip
    blocks = unit(r"transformer_blocks\.\d+")
    layers = unit("attn2?|ff|ff_context")
    order = (
        "pos_embed", "time_text_embed", "timestep_embedder", "text_embedder", "context_embedder", "transformer_blocks",
        "norm1", "norm1_context", "attn", "attn2", "ff", "ff_context",
        "to_q", "to_k", "to_v", "norm_q", "norm_k", "add_q_proj", "add_k_proj", "add_v_proj",
        "norm_added_q", "norm_added_k", "to_add_out", "to_out",
        "norm_out", "proj_out",
    )  # fmt: skip
    siblings = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
    meeting = unit("attn")
    heads = 1
    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    originals: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "x_embedder.proj": ("pos_embed.proj",),
        "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
        "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
        "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
        **{
            f"joint_blocks.*.{theirs}": tuple(f"transformer_blocks.*.{name}" for name in ours)
            for theirs, ours in {
                "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "x_block.attn.proj": ("attn.to_out.0",),
                "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "x_block.attn2.proj": ("attn2.to_out.0",),
                "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "context_block.attn.proj": ("attn.to_add_out",),
                "x_block.attn.ln_q": ("attn.norm_q",),
                "x_block.attn.ln_k": ("attn.norm_k",),
                "x_block.attn2.ln_q": ("attn2.norm_q",),
                "x_block.attn2.ln_k": ("attn2.norm_k",),
                "context_block.attn.ln_q": ("attn.norm_added_q",),
                "context_block.attn.ln_k": ("attn.norm_added_k",),
                "x_block.mlp.fc1": ("ff.net.0.proj",),
                "x_block.mlp.fc2": ("ff.net.2",),
                "context_block.mlp.fc1": ("ff_context.net.0.proj",),
                "context_block.mlp.fc2": ("ff_context.net.2",),
                "x_block.adaLN_modulation.1": ("norm1.linear",),
                "context_block.adaLN_modulation.1": ("norm1_context.linear",),
            }.items()
        },
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    }
    exchanged = frozenset({"norm_out.linear"})

    def is_read(self, model: nn.Module, module: str) -> bool:
        """In the last block the words end: what they ask for there nobody is given."""
        last = f"transformer_blocks.{last_of(model)}.attn"
        return not module.endswith((f"{last}.add_q_proj", f"{last}.norm_added_q"))

    def told(self, model: nn.Module, given: Mapping[str, Any]) -> Told:
        sample = given["hidden_states"]
        text: Tensor = given["encoder_hidden_states"]
        config: Any = model.config
        size, patch = spatial_size(sample), config.patch_size
        pixels = sample.shape[-2:].numel() // patch**2
        return Told(
            rows=len(sample),
            timestep=given.get("timestep"),
            encoder_hidden_states=text,
            sample_size=None if size is None else (size[0] // patch, size[1] // patch),
            joint=Joint(slice(pixels, pixels + text.shape[1]), slice(0, pixels)),
        )

    def original_names(self, model: nn.Module) -> dict[str, tuple[Original, ...]]:
        """In the last block the words end: their norm has a scale and a shift alone, and these are exchanged."""
        found = super().original_names(model)
        last = last_of(model)
        name = f"joint_blocks.{last}.context_block.adaLN_modulation.1"
        module: Any = model.get_submodule(f"transformer_blocks.{last}.norm1_context.linear")
        half = module.out_features // 2
        found[name] = (Original(found[name][0].module, (slice(half, 2 * half), slice(0, half))),)
        return found


def _published(width: int, layers: int, dual: int) -> Components:
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        num_layers=layers,
        num_attention_heads=width // 64,
        caption_projection_dim=width,
        dual_attention_layers=tuple(range(dual)),
        qk_norm="rms_norm",
    )
    first, second = clip_skeleton(768, 12, 12, projection=True), clip_skeleton(1280, 32, 20, projection=True)
    return {
        "transformer": transformer,
        "text_encoder": first,
        "text_encoder_2": second,
        "text_encoder_3": t5_skeleton(),
    }


class StableDiffusion3(Family):
    """A transformer of two streams; two CLIPs and T5 read the text."""

    name = "stable-diffusion-3"
    title = "Stable Diffusion 3 or 3.5"
    denoiser = "transformer"
    patch = 2
    architectures: ClassVar[Mapping[str, Architecture]] = {
        "transformer": SD3Transformer(),
        "text_encoder": CLIPText(),
        "text_encoder_2": CLIPText(),
        "text_encoder_3": T5(),
    }
    skeletons = (
        Skeleton("Stable Diffusion 3.5 medium", _NAMES, lambda: _published(1536, 24, 13)),
        Skeleton("Stable Diffusion 3.5 large", _NAMES, lambda: _published(2432, 38, 0)),
    )
    never_read = 1
    texts = (
        Text(),
        Text("tokenizer_2", "prompt_2"),
        Text("tokenizer_3", "prompt_3", stretch=1, limit=("max_sequence_length", 256)),
    )

    def encode(self, pipe: Any, prompts: list[str], device: Any, **limits: int) -> Any:
        return pipe.encode_prompt(prompts, None, None, device=device, do_classifier_free_guidance=False, **limits)

    def together(self, encoded: Any, others: Sequence[Any]) -> Together:
        embeds, negative, *pooled = encoded
        further = [other[0] for other in others]
        owners = whose(embeds, further)
        if negative is None:
            return Together((behind(embeds, further), negative, *pooled), owners)
        filled = behind(negative, [torch.zeros_like(other) for other in further])
        return Together(
            (behind(embeds, further), filled, *pooled), owners, owners[0].masked_fill(owners[0] != PROMPT, NOBODY)
        )

    def conditions(self, pipe: Any, prompts: list[str]) -> Conditions:
        embeds, _, pooled, _ = self.encode(pipe, prompts, pipe.transformer.device)
        return Conditions(embeds, {"pooled_projections": pooled})
