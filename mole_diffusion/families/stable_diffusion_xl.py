"""Stable Diffusion XL and what was trained from it: Illustrious, NoobAI, Pony."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import MoLEError
from .architecture import Architecture
from .base import ALL, Conditions, Family, Listening, Text, unwrapped
from .clip import CLIPText, clip_skeleton, layers_behind
from .skeleton import Components, Skeleton
from .together import Together
from .unet import NAMES, UNet, together


def _published() -> Components:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )
    second = clip_skeleton(1280, 32, 20, projection=True)
    return {"unet": unet, "text_encoder": clip_skeleton(768, 12, 12), "text_encoder_2": second}


class StableDiffusionXL(Family):
    """A UNet that is also told sizes and a summary of the text, which two CLIPs read."""

    name = "stable-diffusion-xl"
    title = "Stable Diffusion XL"
    denoiser = "unet"
    architectures: ClassVar[Mapping[str, Architecture]] = {
        "unet": UNet(),
        "text_encoder": CLIPText(),
        "text_encoder_2": CLIPText(),
    }
    skeletons = (Skeleton("Stable Diffusion XL", NAMES, _published),)

    texts = (Text(), Text("tokenizer_2", "prompt_2"))
    never_read = 1

    def fits(self, components: Mapping[str, Any]) -> bool:
        return super().fits(components) and components["unet"].config.addition_embed_type == "text_time"

    def is_read(self, components: Mapping[str, Any], component: str, module: str, listening: Listening = ALL) -> bool:
        """Of both text encoders the last layer but one is taken, and of the second the summary, from the very end."""
        if component == "unet" or (component == "text_encoder_2" and listening.summary):
            return super().is_read(components, component, module, listening)
        behind = layers_behind(unwrapped(components[component]), module)
        return behind is not None and behind >= self.never_read + (0 if listening.negative else listening.skipped)

    def together(self, encoded: Any, others: Sequence[Any]) -> Together:
        return together(encoded, others)

    def conditions(self, pipe: Any, prompts: list[str]) -> Conditions:
        embeds, _, pooled, _ = self.encode(pipe, prompts, pipe.unet.device)
        if pipe.config.force_zeros_for_empty_prompt:
            # A product instead of an assignment, which would break the graph.
            told = torch.tensor([float(prompt != "") for prompt in prompts], device=embeds.device, dtype=embeds.dtype)
            embeds, pooled = embeds * told[:, None, None], pooled * told[:, None]
        return Conditions(embeds, {"text_embeds": pooled})

    def predict(self, pipe: Any, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Told beside the prompt are a summary of it, and that the picture was neither cut nor resized."""
        height, width = (side * pipe.vae_scale_factor for side in latents.shape[-2:])
        sizes = latents.new_tensor([height, width, 0, 0, height, width]).expand(len(latents), -1)
        added = {"added_cond_kwargs": {**conditions.others, "time_ids": sizes}}
        return super().predict(pipe, latents, timesteps, Conditions(conditions.prompt_embeds, added))

    def refuse(self, components: Mapping[str, Any]) -> None:
        # The refiner has the second text encoder only; without any, prompts were encoded elsewhere.
        if components.get("text_encoder") is None and components.get("text_encoder_2") is not None:
            raise MoLEError(
                "this is the refiner of Stable Diffusion XL: it has one text encoder and a UNet of its own, which no "
                "LoRA for Stable Diffusion XL fits. Compose LoRAs on the base model, and give its latents to a stock "
                "StableDiffusionXLImg2ImgPipeline with the refiner."
            )
