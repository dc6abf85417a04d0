"""Krea 2."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from .architecture import Architecture, Told, packed_grid, unit
from .base import Conditions, Family, Reading
from .chats import MARK, chat_reading
from .flux import TIMESTEPS, words_then_pixels
from .latents import from_patches, latent_side, size_shift, time_shift, to_patches
from .qwen_image import video_distribution, video_latents, video_picture
from .skeleton import Components, Skeleton
from .together import Together, behind, masks_behind, whose


class Krea2Transformer(Architecture):
    """diffusers' `Krea2Transformer2DModel`.

    Several layers of the text encoder are fused into one text, then words and pixels are one sequence
    `[words, pixels]`. Several heads share their keys and values.
    """

    classes = ("Krea2Transformer2DModel",)
    denoiser = True
    tokens = "pixels"
    vectors = frozenset({"time_embed", "time_mod_proj"})
    words = frozenset({"text_fusion", "txt_in"})
    both = frozenset({"transformer_blocks"})
    blocks = unit(r"(?:transformer|layerwise|refiner)_blocks\.\d+")
    layers = unit("attn|ff")
    order = (
        "time_embed", "time_mod_proj", "text_fusion", "layerwise_blocks", "projector", "refiner_blocks", "txt_in",
        "norm", "linear_1", "linear_2", "img_in", "transformer_blocks", "norm1", "attn", "to_q", "to_k", "to_v",
        "to_gate", "norm_q", "norm_k", "to_out", "norm2", "ff", "gate", "up", "down", "final_layer", "linear",
    )  # fmt: skip
    siblings = (("to_q", "to_k", "to_v", "to_gate"), ("ff.gate", "ff.up"))
    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate", "attn.to_out.0", "ff.gate", "ff.up", "ff.down")
    originals: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "first": ("img_in",),
        "tmlp.0": ("time_embed.linear_1",),
        "tmlp.2": ("time_embed.linear_2",),
        "tproj.1": ("time_mod_proj",),
        "txtmlp.1": ("txt_in.linear_1",),
        "txtmlp.3": ("txt_in.linear_2",),
        "txtfusion.projector": ("text_fusion.projector",),
        **{
            f"{theirs}.*.{name}": (f"{ours}.*.{other}",)
            for theirs, ours in {
                "blocks": "transformer_blocks",
                "txtfusion.layerwise_blocks": "text_fusion.layerwise_blocks",
                "txtfusion.refiner_blocks": "text_fusion.refiner_blocks",
            }.items()
            for name, other in {
                "attn.wq": "attn.to_q",
                "attn.wk": "attn.to_k",
                "attn.wv": "attn.to_v",
                "attn.wo": "attn.to_out.0",
                "attn.gate": "attn.to_gate",
                "attn.qknorm.qnorm": "attn.norm_q",
                "attn.qknorm.knorm": "attn.norm_k",
                "mlp.gate": "ff.gate",
                "mlp.up": "ff.up",
                "mlp.down": "ff.down",
            }.items()
        },
        "last.linear": ("final_layer.linear",),
    }
    meeting = unit(r"(?<!\w)transformer_blocks\.\d+\.attn")
    refining = unit(r"refiner_blocks\.\d+\.attn")
    heads = 2

    def told(self, model: nn.Module, given: Mapping[str, Any]) -> Told:
        text, places, mask = (given.get(k) for k in ("encoder_hidden_states", "position_ids", "encoder_attention_mask"))
        grid = packed_grid(places, first=text.shape[1]) if isinstance(text, Tensor) else None
        return words_then_pixels(given, grid, mask.bool() if isinstance(mask, Tensor) else None)

    def packs(self, module: str) -> bool:
        return "layerwise_blocks" in module.split(".")

    def lengths(self, module: str, told: Told) -> tuple[int, ...] | None:
        if told.encoder_hidden_states is None or not self.packs(module):
            return None
        # They attend over the layers of the text encoder, each word by itself: rows are words there.
        _, words, layers, _ = told.encoder_hidden_states.shape
        return (words * layers,) * told.rows


DISTILLED_SHIFT = 1.15  # mu of the distilled model, whatever the size, as its pipeline has it
LENGTH = 512  # tokens of a prompt, with what the template puts behind it, where a call does not say

_NAMES = r"blocks_\d+_(attn_(wq|wk|wv|wo|gate|to_)|mlp_(gate|up|down)|ff_(gate|up|down))"


def _published() -> Components:
    from diffusers import Krea2Transformer2DModel

    return {"transformer": Krea2Transformer2DModel()}


class Krea2(Family):
    """A transformer of one stream; Qwen3-VL reads the text."""

    name = "krea2"
    title = "Krea 2"
    denoiser = "transformer"
    patch = 2
    architectures: ClassVar[Mapping[str, Architecture]] = {"transformer": Krea2Transformer()}
    skeletons = (Skeleton("Krea 2", _NAMES, _published),)

    def readings(self, pipe: Any, given: Mapping[str, Any]) -> list[Reading]:
        dropped = pipe.prompt_template_encode_start_idx
        # What the template puts behind a prompt comes after the padding, and has its own tokens kept free.
        length = (given.get("max_sequence_length") or LENGTH) + dropped - pipe.prompt_template_encode_num_suffix_tokens
        rendered = pipe.prompt_template_encode_prefix + MARK
        return [chat_reading(pipe.tokenizer, given, rendered, length, dropped=dropped)]

    def encode(self, pipe: Any, prompts: list[str], device: Any, **limits: int) -> Any:
        return pipe.encode_prompt(prompts, device=device, **limits)

    def together(self, encoded: Any, others: Sequence[Any]) -> Together:
        embeds, mask = encoded
        further = [other[:, there[0].bool()] for other, there in others]  # words have no place, so filling may go
        mask = masks_behind(embeds, mask, further, [None] * len(further))
        return Together((behind(embeds, further), mask), whose(embeds, further))

    def as_long(self, encoded: Any, tokens: int) -> Any:
        embeds, mask = encoded
        missing = tokens - embeds.shape[1]  # the mask hides them
        return nn.functional.pad(embeds, (0, 0, 0, 0, 0, missing)), nn.functional.pad(mask, (0, missing))

    def conditions(self, pipe: Any, prompts: list[str]) -> Conditions:
        embeds, mask = self.encode(pipe, prompts, pipe.transformer.device)
        return Conditions(embeds, {"encoder_attention_mask": mask})

    def latent_shape(self, pipe: Any) -> tuple[int, ...]:
        return ((latent_side(pipe) // pipe.patch_size) ** 2, pipe.transformer.config.in_channels)

    def distribution(self, pipe: Any, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return video_distribution(pipe, pictures)

    def latents(self, pipe: Any, encoded: Tensor) -> Tensor:
        return to_patches(video_latents(pipe, encoded))

    def shift(self, pipe: Any) -> float | None:
        if pipe.config.is_distilled and pipe.scheduler.config.get("use_dynamic_shifting", False):
            return time_shift(pipe.scheduler.config, DISTILLED_SHIFT)
        return size_shift(pipe, self.latent_shape(pipe)[0])

    def predict(self, pipe: Any, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        side = math.isqrt(latents.shape[1])
        words = conditions.prompt_embeds.shape[1]
        prediction: Tensor = pipe.transformer(
            hidden_states=latents,
            timestep=timesteps / TIMESTEPS,
            encoder_hidden_states=conditions.prompt_embeds,
            position_ids=pipe.prepare_position_ids(words, side, side, latents.device),
            return_dict=False,
            **conditions.others,
        )[0]
        return prediction

    def picture(self, pipe: Any, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return video_picture(pipe, from_patches(latents, grid))
