"""Random pipelines of Stable Diffusion XL and 3.5, and ControlNets, as small as `tests.tiny`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.tiny import text_config, tiny_components, tiny_tokenizer
from tests.tiny.copies import made_once
from tests.tiny.dits import t5_tokenizer, tiny_vae

WIDTH = 16  # of text encoders


def _clip() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(text_config(tiny_tokenizer(), WIDTH))


@made_once
def sdxl(seed: int = 0) -> dict[str, Any]:
    """Components of a Stable Diffusion XL of 32x32 pixels; its second tokenizer pads with another token."""
    parts = tiny_components(seed)
    second = tiny_tokenizer()
    second.pad_token = "!"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=32 + WIDTH,
            attention_head_dim=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        )
        second_encoder = _clip()
    return {
        "vae": parts["vae"],
        "text_encoder": parts["text_encoder"],
        "tokenizer": parts["tokenizer"],
        "text_encoder_2": second_encoder.eval(),
        "tokenizer_2": second,
        "unet": unet.eval(),
        "scheduler": parts["scheduler"],
    }


@made_once
def sd3(seed: int = 0) -> dict[str, Any]:
    """Components of a Stable Diffusion 3.5 of 32x32 pixels: two blocks, the first with a second attention."""
    t5 = t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "vae": tiny_vae(16),  # as diffusers' inpainting wants them
            "text_encoder": _clip(),
            "text_encoder_2": _clip(),
            "text_encoder_3": T5EncoderModel(
                T5Config(vocab_size=len(t5), d_model=2 * WIDTH, d_ff=2 * WIDTH, d_kv=8, num_layers=2, num_heads=2)
            ),
            "transformer": SD3Transformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=16,
                out_channels=16,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=2 * WIDTH,
                caption_projection_dim=32,
                pooled_projection_dim=2 * WIDTH,
                pos_embed_max_size=16,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
            ),
        }
    models = {name: part.eval() for name, part in parts.items() if isinstance(part, nn.Module)}
    return {
        **models,
        "tokenizer": tiny_tokenizer(),
        "tokenizer_2": tiny_tokenizer(),
        "tokenizer_3": t5,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def controlnet(unet: UNet2DConditionModel, seed: int = 0) -> ControlNetModel:
    """A ControlNet for a tiny UNet whose residuals are not the zeros that it would begin with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
        with torch.no_grad():
            for block in (*model.controlnet_down_blocks, model.controlnet_mid_block):
                block.weight.normal_(std=0.1)
    return model.eval()
