"""FLUX.2, dev and klein."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .architecture import Architecture, Told, packed_grid, unit
from .base import Conditions, Family, Reading
from .chats import MARK, QWEN_END, chat_reading
from .flux import DOUBLE_ATTENTION, NAMES, SINGLE_NORMS, TIMESTEPS, words_then_pixels
from .latents import from_patches, latent_side, positions, time_shift, to_patches
from .skeleton import Components, Skeleton
from .together import Together, behind, whose


class Flux2Transformer(Architecture):
    """diffusers' `Flux2Transformer2DModel`.

    Blocks with Linears of their own for words and pixels, then blocks of one sequence `[words, pixels]` whose attention
    and feed-forward share one Linear in and one out.

    What changes with the step comes from three Linears for the whole model, not from one in each block.
    """

    classes = ("Flux2Transformer2DModel",)
    denoiser = True
    tokens = "pixels"
    vectors = frozenset(
        {
            "time_guidance_embed", "double_stream_modulation_img", "double_stream_modulation_txt",
            "single_stream_modulation", "norm_out",
        }
    )  # fmt: skip
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
        "time_guidance_embed", "timestep_embedder", "guidance_embedder", "linear_1", "linear_2",
        "double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation",
        "x_embedder", "context_embedder", "transformer_blocks", "single_transformer_blocks",
        "attn", "to_qkv_mlp_proj", "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj",
        "norm_q", "norm_k", "norm_added_q", "norm_added_k", "to_add_out", "to_out", "ff", "ff_context",
        "linear_in", "linear_out", "norm_out", "proj_out",
    )  # fmt: skip
    siblings = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj")
    originals: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
        "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
        **{
            f"double_blocks.*.{theirs}": tuple(f"transformer_blocks.*.{name}" for name in ours)
            for theirs, ours in {
                **DOUBLE_ATTENTION,
                "img_mlp.0": ("ff.linear_in",),
                "img_mlp.2": ("ff.linear_out",),
                "txt_mlp.0": ("ff_context.linear_in",),
                "txt_mlp.2": ("ff_context.linear_out",),
            }.items()
        },
        "single_blocks.*.linear1": ("single_transformer_blocks.*.attn.to_qkv_mlp_proj",),
        "single_blocks.*.linear2": ("single_transformer_blocks.*.attn.to_out",),
        **SINGLE_NORMS,
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    }
    exchanged = frozenset({"norm_out.linear"})
    meeting = unit("attn")
    heads = 2

    def told(self, model: nn.Module, given: Mapping[str, Any]) -> Told:
        mode = given.get("kv_cache_mode")
        cache = None if mode is None else f"kv_cache_mode={mode!r}, which keeps keys and values of reference pictures"
        return words_then_pixels(given, packed_grid(given.get("img_ids")), cache=cache)


GUIDANCE = 4.0  # that dev is told where nobody says another, as in diffusers
STEPS = 50
LENGTH = 512  # tokens of a prompt that are read at most, where a call does not say


def _published(heads: int, layers: int, single: int, words: int, guided: bool = False) -> Components:
    from diffusers import Flux2Transformer2DModel

    return {
        "transformer": Flux2Transformer2DModel(
            num_layers=layers,
            num_single_layers=single,
            num_attention_heads=heads,
            joint_attention_dim=words,
            guidance_embeds=guided,
        )
    }


class Flux2(Family):
    """A transformer of two streams, then of one; Mistral (dev) or Qwen (klein) reads the text."""

    name = "flux2"
    title = "FLUX.2"
    denoiser = "transformer"
    patch = 2
    architectures: ClassVar[Mapping[str, Architecture]] = {"transformer": Flux2Transformer()}
    skeletons = (
        Skeleton("FLUX.2 dev", NAMES, lambda: _published(48, 8, 48, 15360, guided=True)),
        Skeleton("FLUX.2 klein 9B", NAMES, lambda: _published(32, 8, 24, 12288)),
        Skeleton("FLUX.2 klein 4B", NAMES, lambda: _published(24, 5, 20, 7680)),
    )

    def readings(self, pipe: Any, given: Mapping[str, Any]) -> list[Reading]:
        length = given.get("max_sequence_length") or LENGTH
        if hasattr(pipe.tokenizer, "tokenizer"):  # Mistral's processor of texts and pictures
            tokenizer, end = pipe.tokenizer.tokenizer, "[/INST]"
            said = {"system": pipe.system_message, "user": MARK}
            messages = [{"role": who, "content": [{"type": "text", "text": what}]} for who, what in said.items()]
            rendered = pipe.tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
            # A processor adds no second token for the beginning where a template has it.
            special = not (tokenizer.bos_token and rendered.startswith(tokenizer.bos_token))
        else:
            tokenizer, end, special = pipe.tokenizer, QWEN_END, True
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        return [chat_reading(tokenizer, given, rendered, length, special=special, end=end)]

    def encode(self, pipe: Any, prompts: list[str], device: Any, **limits: int) -> Any:
        return pipe.encode_prompt(prompts, device=device, **limits)

    def together(self, encoded: Any, others: Sequence[Any]) -> Together:
        embeds, places = encoded
        further = [other[0] for other in others]
        # Each prompt's tokens are counted from its own beginning, as if it stood alone.
        places = behind(places, [other[1] for other in others])
        return Together((behind(embeds, further), places), whose(embeds, further))

    def latent_shape(self, pipe: Any) -> tuple[int, ...]:
        return ((latent_side(pipe) // 2) ** 2, pipe.transformer.config.in_channels)

    def shift(self, pipe: Any) -> float | None:
        if not pipe.scheduler.config.get("use_dynamic_shifting", False):
            return None
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu  # older versions have none

        # Its pipelines take the number of steps into account too; this is that of a call that says nothing.
        return time_shift(pipe.scheduler.config, compute_empirical_mu(self.latent_shape(pipe)[0], STEPS))

    def predict(self, pipe: Any, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        rows, side = len(latents), math.isqrt(latents.shape[1])
        guided = pipe.transformer.config.guidance_embeds
        words = positions(1, conditions.prompt_embeds.shape[1], 4, latents).roll(1, dims=1)  # counted on the last axis
        prediction: Tensor = pipe.transformer(
            hidden_states=latents,
            timestep=timesteps / TIMESTEPS,
            guidance=latents.new_full((rows,), GUIDANCE, dtype=torch.float32) if guided else None,
            encoder_hidden_states=conditions.prompt_embeds,
            txt_ids=words.expand(rows, -1, -1),
            img_ids=positions(side, side, 4, latents).expand(rows, -1, -1),
            return_dict=False,
        )[0]
        return prediction

    def latents(self, pipe: Any, encoded: Tensor) -> Tensor:
        mean, deviation = _normalisation(pipe.vae, encoded)
        return (to_patches(encoded) - mean) / deviation

    def picture(self, pipe: Any, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        vae = pipe.vae
        mean, deviation = _normalisation(vae, latents)
        latents = latents * deviation + mean
        decoded: Tensor = vae.decode(from_patches(latents, grid).to(vae.dtype), return_dict=False)[0]
        return decoded


def _normalisation(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every number of a patch, `(1, 1, numbers)`."""
    mean, variance = (x.view(1, 1, -1).to(like) for x in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config.batch_norm_eps).sqrt()
