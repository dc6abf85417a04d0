"""Qwen-Image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from .architecture import Architecture, Told, last_of, unit
from .base import Conditions, Family, Reading
from .chats import MARK, chat_reading
from .flux import TIMESTEPS, words_then_pixels
from .latents import from_patches, latent_side, size_shift, to_patches
from .skeleton import DIFFUSERS_BLOCKS, Components, Skeleton
from .together import Together, behind, masks_behind, whose


class QwenImageTransformer(Architecture):
    """diffusers' `QwenImageTransformer2DModel`.

    Words and pixels have Linears of their own in every block and meet in its attention.
    """

    classes = ("QwenImageTransformer2DModel",)
    denoiser = True
    tokens = "pixels"
    vectors = frozenset({"time_text_embed", "img_mod", "txt_mod", "norm_out"})
    words = frozenset(
        {
            "txt_norm", "txt_in", "add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k",
            "to_add_out", "txt_mlp",
        }
    )  # fmt: skip
    blocks = unit(r"transformer_blocks\.\d+")
    layers = unit("attn|img_mlp|txt_mlp")
    order = (
        "img_in", "txt_norm", "txt_in", "time_text_embed", "linear_1", "linear_2", "transformer_blocks", "img_mod",
        "txt_mod", "attn", "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj",
        "norm_q", "norm_k", "norm_added_q", "norm_added_k", "to_out", "to_add_out",
        "img_mlp", "txt_mlp", "norm_out", "proj_out",
    )  # fmt: skip
    siblings = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    meeting = unit("attn")
    heads = 2

    def is_read(self, model: nn.Module, module: str) -> bool:
        """Words have no place in the picture: what becomes of them in the last block nobody is given."""
        name = module.partition(f"transformer_blocks.{last_of(model)}.")[2]
        return not name.startswith(("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp."))

    def told(self, model: nn.Module, given: Mapping[str, Any]) -> Told:
        mask = given.get("encoder_hidden_states_mask")
        return words_then_pixels(
            given, _grid(given.get("img_shapes")), mask.bool() if isinstance(mask, Tensor) else None
        )


def _grid(shapes: Any) -> tuple[int, int] | None:
    """Height and width in tokens, from `(frames, height, width)` of the pictures of each sample, its own first."""
    while isinstance(shapes, list) and shapes:
        shapes = shapes[0]
    return (int(shapes[1]), int(shapes[2])) if shapes else None


LENGTH = 1024  # tokens of a prompt that are read at most, where a call does not say

_NAMES = rf"transformer_blocks_\d+_(img|txt)_(mlp|mod)_|{DIFFUSERS_BLOCKS}"


def _published() -> Components:
    from diffusers import QwenImageTransformer2DModel

    return {"transformer": QwenImageTransformer2DModel()}


class QwenImage(Family):
    """A transformer of two streams; Qwen2.5-VL reads the text."""

    name = "qwen-image"
    title = "Qwen-Image"
    denoiser = "transformer"
    patch = 2
    architectures: ClassVar[Mapping[str, Architecture]] = {"transformer": QwenImageTransformer()}
    skeletons = (Skeleton("Qwen-Image", _NAMES, _published),)

    def readings(self, pipe: Any, given: Mapping[str, Any]) -> list[Reading]:
        dropped = pipe.prompt_template_encode_start_idx
        length = min(given.get("max_sequence_length") or LENGTH, pipe.tokenizer_max_length) + dropped
        rendered = pipe.prompt_template_encode.format(MARK)
        return [chat_reading(pipe.tokenizer, given, rendered, length, dropped=dropped, gathered=True)]

    def encode(self, pipe: Any, prompts: list[str], device: Any, **limits: int) -> Any:
        return pipe.encode_prompt(prompts, device=device, **limits)

    def together(self, encoded: Any, others: Sequence[Any]) -> Together:
        embeds, mask = encoded
        further = [other[0] for other in others]
        mask = masks_behind(embeds, mask, further, [other[1] for other in others])
        return Together((behind(embeds, further), mask), whose(embeds, further))

    def conditions(self, pipe: Any, prompts: list[str]) -> Conditions:
        embeds, mask = self.encode(pipe, prompts, pipe.transformer.device)
        return Conditions(embeds, {} if mask is None else {"encoder_hidden_states_mask": mask})

    def latent_shape(self, pipe: Any) -> tuple[int, ...]:
        return ((latent_side(pipe) // 2) ** 2, pipe.transformer.config.in_channels)

    def distribution(self, pipe: Any, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return video_distribution(pipe, pictures)

    def latents(self, pipe: Any, encoded: Tensor) -> Tensor:
        return to_patches(video_latents(pipe, encoded))

    def shift(self, pipe: Any) -> float | None:
        return size_shift(pipe, self.latent_shape(pipe)[0])

    def predict(self, pipe: Any, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        side = math.isqrt(latents.shape[1])
        prediction: Tensor = pipe.transformer(
            hidden_states=latents,
            timestep=timesteps / TIMESTEPS,
            encoder_hidden_states=conditions.prompt_embeds,
            img_shapes=[[(1, side, side)]] * len(latents),
            return_dict=False,
            **conditions.others,
        )[0]
        return prediction

    def picture(self, pipe: Any, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return video_picture(pipe, from_patches(latents, grid))


def video_distribution(pipe: Any, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of latents `(rows, channels, height, width)`, by an autoencoder of videos."""
    found = pipe.vae.encode(pictures.unsqueeze(2).to(pipe.vae.device, pipe.vae.dtype)).latent_dist
    return found.mean[:, :, 0], found.std[:, :, 0]


def video_latents(pipe: Any, encoded: Tensor) -> Tensor:
    """Latents `(rows, channels, height, width)` of mean 0 and deviation 1: `video_picture` undoes it."""
    mean, deviation = _normalisation(pipe.vae, encoded)
    return (encoded - mean) / deviation


def video_picture(pipe: Any, latents: Tensor) -> Tensor:
    """Pictures of latents `(rows, channels, height, width)`, by an autoencoder of videos: one frame."""
    vae = pipe.vae
    mean, deviation = _normalisation(vae, latents)
    frames = (latents * deviation + mean).unsqueeze(2)
    decoded: Tensor = vae.decode(frames.to(vae.dtype), return_dict=False)[0][:, :, 0]
    return decoded


def _normalisation(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel, `(1, channels, 1, 1)`."""
    numbers = vae.config.latents_mean, vae.config.latents_std
    mean, deviation = (like.new_tensor(one).view(1, -1, 1, 1) for one in numbers)
    return mean, deviation
