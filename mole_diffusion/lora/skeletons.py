"""The published base models as empty shells: all modules with their sizes, no weights and no memory.

What a LoRA file was made for can be told by which of them it fits. Sizes are those of the models' own configs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

Components = dict[str, nn.Module]


@dataclass(frozen=True)
class Skeleton:
    """One published base model.

    Attributes:
        title: The name that people know it by.
        marks: A name of a module, with underscores for dots, that only such models have.
        make: Builds it; call `build`.
    """

    title: str
    marks: str
    make: Callable[[], Components]

    def build(self) -> Components:
        """Its components by name, on the meta device."""
        with torch.device("meta"):
            return self.make()


def candidates(modules: Iterable[str]) -> list[Skeleton]:
    """The base models that a file may be for, by names of modules as it spells them; all where the names tell nothing.

    Args:
        modules: Names with dots or underscores.
    """
    names = [module.replace(".", "_") for module in modules]
    return [known for known in SKELETONS if any(re.search(known.marks, name) for name in names)] or list(SKELETONS)


def names_of(modules: Iterable[str]) -> str | None:
    """The base models that a file's names are of, for a message; None where the names tell nothing."""
    found = [known.title for known in candidates(modules)]
    if len(found) == len(SKELETONS):
        return None
    return " or ".join(filter(None, [", ".join(found[:-1]), found[-1]]))


def _clip(hidden: int, layers: int, heads: int, *, projection: bool = False) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=hidden,
    )
    model: nn.Module = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    return model


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu", vocab_size=32128
    )
    model: nn.Module = T5EncoderModel(config)
    return model


def _stable_diffusion_1() -> Components:
    from diffusers import UNet2DConditionModel

    return {"unet": UNet2DConditionModel(cross_attention_dim=768), "text_encoder": _clip(768, 12, 12)}


def _stable_diffusion_2() -> Components:
    from diffusers import UNet2DConditionModel

    heads = (5, 10, 20, 20)
    unet = UNet2DConditionModel(cross_attention_dim=1024, attention_head_dim=heads, use_linear_projection=True)
    return {"unet": unet, "text_encoder": _clip(1024, 23, 16)}


def _stable_diffusion_xl() -> Components:
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
    second = _clip(1280, 32, 20, projection=True)
    return {"unet": unet, "text_encoder": _clip(768, 12, 12), "text_encoder_2": second}


def _stable_diffusion_3(width: int, layers: int, dual: int) -> Components:
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        num_layers=layers,
        num_attention_heads=width // 64,
        caption_projection_dim=width,
        dual_attention_layers=tuple(range(dual)),
        qk_norm="rms_norm",
    )
    first, second = _clip(768, 12, 12, projection=True), _clip(1280, 32, 20, projection=True)
    return {"transformer": transformer, "text_encoder": first, "text_encoder_2": second, "text_encoder_3": _t5()}


def _flux() -> Components:
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(guidance_embeds=True)
    return {"transformer": transformer, "text_encoder": _clip(768, 12, 12), "text_encoder_2": _t5()}


def _flux2(heads: int, layers: int, single: int, words: int, guided: bool = False) -> Components:
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


def _z_image() -> Components:
    from diffusers import ZImageTransformer2DModel

    return {"transformer": ZImageTransformer2DModel()}


def _krea2() -> Components:
    from diffusers import Krea2Transformer2DModel

    return {"transformer": Krea2Transformer2DModel()}


def _qwen_image() -> Components:
    from diffusers import QwenImageTransformer2DModel

    return {"transformer": QwenImageTransformer2DModel()}


_UNET = r"(down|up)_blocks_\d|mid_block|(in|out)put_blocks_\d|middle_block|text_model|encoder_layers_\d"
_CLIP = r"text_model|encoder_layers_\d"
_SHARED = r"(^|unet_)transformer_blocks_\d+_(attn_(to|add)_|ff_|norm1)"  # diffusers' names in several families
_BLOCKS = rf"double_blocks_\d|single_blocks_\d|single_transformer_blocks_\d|stream_modulation|{_SHARED}"
SKELETONS: tuple[Skeleton, ...] = (
    Skeleton("Stable Diffusion 1.x", _UNET, _stable_diffusion_1),
    Skeleton("Stable Diffusion 2.x", _UNET, _stable_diffusion_2),
    Skeleton("Stable Diffusion XL", _UNET, _stable_diffusion_xl),
    Skeleton("FLUX.1", rf"{_BLOCKS}|{_CLIP}|encoder_block_\d", _flux),
    Skeleton("FLUX.2 dev", _BLOCKS, lambda: _flux2(48, 8, 48, 15360, guided=True)),
    Skeleton("FLUX.2 klein 9B", _BLOCKS, lambda: _flux2(32, 8, 24, 12288)),
    Skeleton("FLUX.2 klein 4B", _BLOCKS, lambda: _flux2(24, 5, 20, 7680)),
    Skeleton("Z-Image", r"(layers|_refiner)_\d+_(attention|feed_forward|adaLN_modulation)_", _z_image),
    Skeleton("Krea 2", r"blocks_\d+_(attn_(wq|wk|wv|wo|gate|to_)|mlp_(gate|up|down)|ff_(gate|up|down))", _krea2),
    Skeleton("Qwen-Image", rf"transformer_blocks_\d+_(img|txt)_(mlp|mod)_|{_SHARED}", _qwen_image),
    Skeleton("Stable Diffusion 3.5 medium", rf"joint_blocks_\d|{_SHARED}", lambda: _stable_diffusion_3(1536, 24, 13)),
    Skeleton("Stable Diffusion 3.5 large", rf"joint_blocks_\d|{_SHARED}", lambda: _stable_diffusion_3(2432, 38, 0)),
)
