"""Random pipelines of the transformer families, small enough to draw a picture in a fraction of a second.

FLUX.1, FLUX.2 (dev and klein), Z-Image, Krea 2 and Qwen-Image, stock classes with stock schedulers. Text encoders are
of the kinds that the families use, and tokenizers know `tests.tiny.WORDS` as one token each, behind the chat templates
of the families' models: 34 tokens of Qwen-Image's prompt are its system message here too. Everything is deterministic
in its seed and touches neither the network nor the disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from mole_diffusion.families import arguments
from tests.tiny import WORDS, learn_merges, text_config, tiny_tokenizer
from tests.tiny.copies import made_once

SIZE = 32  # pixels to a side; 8 x 8 tokens in every family
WIDTH = 16  # of text encoders

# Words of the system message that Qwen-Image and Krea 2 put before a prompt: one token each, as in Qwen's vocabulary.
SYSTEM = (
    "system user assistant Describe the image by detailing the color shape size texture quantity text spatial "
    "relationships of the objects and background"
).split()
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# As Qwen's own template lays it out for one message of a user.
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content[0].text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ m.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def qwen_tokenizer(beside: Sequence[str] = SYSTEM) -> Qwen2Tokenizer:
    """A Qwen tokenizer that knows the words, with and without a space before them, and spells everything else.

    Args:
        beside: Words that it knows beside `WORDS`.
    """
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([QWEN_SPECIAL[0], *alphabet])}
    words = dict.fromkeys([*WORDS, *beside])
    merges = learn_merges(vocab, [*words, *("\u0120" + word for word in words)])  # a space is spelt so there
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIAL[1:])})
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def mistral_processor() -> PixtralProcessor:
    """Mistral's processor around such a tokenizer, with tokens for pictures that nobody shows it."""
    special = ["<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    special += ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    inner = PreTrainedTokenizerFast(
        tokenizer_object=qwen_tokenizer(re.findall(r"\w+", SYSTEM_MESSAGE)).backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special[3:],
        padding_side="left",  # so that words stand far from where their prompt begins
    )
    return PixtralProcessor(PixtralImageProcessor(), inner, chat_template=MISTRAL_TEMPLATE)


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer that knows the words as one piece each and spells everything else."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    pieces += [("\u2581" + word, -2.0) for word in WORDS] + [(letter, -8.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def tiny_vae(latent_channels: int = 4) -> AutoencoderKL:
    """Of two levels, with a shift and a scale of its latents."""
    return AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        layers_per_block=1,
        shift_factor=0.1,
        scaling_factor=0.4,
    )


def _qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def _sizes(layers: int, vocabulary: int) -> dict[str, Any]:
    """What the configurations of language models have in common."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": WIDTH // 2,
        "max_position_embeddings": 1024,
    }


def flux() -> dict[str, Any]:
    """FLUX.1: two double blocks, two single ones."""
    clip, t5 = tiny_tokenizer(), t5_tokenizer()
    return {
        "scheduler": _scheduler(),
        "vae": tiny_vae(),
        "tokenizer": clip,
        "text_encoder": CLIPTextModel(text_config(clip, WIDTH)),
        "tokenizer_2": t5,
        "text_encoder_2": T5EncoderModel(
            T5Config(vocab_size=len(t5), d_model=WIDTH, d_ff=2 * WIDTH, d_kv=8, num_layers=2, num_heads=2)
        ),
        "transformer": FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
    }


def _flux2_parts(guidance_embeds: bool) -> dict[str, Any]:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    return {"scheduler": _scheduler(), "vae": vae, "transformer": transformer}


def flux2() -> dict[str, Any]:
    """FLUX.2 dev: two double blocks, two single ones."""
    processor = mistral_processor()
    text = MistralConfig(**_sizes(30, len(processor.tokenizer)))  # the 10th, 20th and 30th layer are read
    vision = PixtralVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32, head_dim=8
    )
    return {
        **_flux2_parts(guidance_embeds=True),
        "tokenizer": processor,
        "text_encoder": Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)),
    }


def flux2_klein() -> dict[str, Any]:
    """FLUX.2 klein, the base model: its guidance is a second call."""
    tokenizer = qwen_tokenizer()
    return {
        **_flux2_parts(guidance_embeds=False),
        "tokenizer": tokenizer,
        # The 9th, 18th and 27th layer are read.
        "text_encoder": Qwen3ForCausalLM(Qwen3Config(**_sizes(27, len(tokenizer)))),
    }


def z_image() -> dict[str, Any]:
    """Z-Image: a refiner of each kind, two layers."""
    tokenizer = qwen_tokenizer()
    return {
        "scheduler": _scheduler(),
        "vae": tiny_vae(),
        "tokenizer": tokenizer,
        "text_encoder": Qwen3Model(Qwen3Config(**_sizes(2, len(tokenizer)))),
        "transformer": ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 32, 32],
        ),
    }


def krea2() -> dict[str, Any]:
    """Krea 2: two layers of four heads that share two keys and values."""
    tokenizer = qwen_tokenizer()
    text = {**_sizes(2, len(tokenizer)), "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": WIDTH,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    return {
        "scheduler": _scheduler(),
        "vae": _qwen_vae(),
        "tokenizer": tokenizer,
        "text_encoder": Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)),
        "text_encoder_select_layers": (1, 2),
        "transformer": Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            timestep_embed_dim=32,
            text_hidden_dim=WIDTH,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        ),
    }


def qwen_image() -> dict[str, Any]:
    """Qwen-Image: two double blocks."""
    tokenizer = qwen_tokenizer()
    text = {**_sizes(2, len(tokenizer)), "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": WIDTH}
    return {
        "scheduler": _scheduler(),
        "vae": _qwen_vae(),
        "tokenizer": tokenizer,
        "text_encoder": Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        "transformer": QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
    }


MADE: dict[str, tuple[type, Callable[[], dict[str, Any]]]] = {
    "flux": (FluxPipeline, flux),
    "flux2": (Flux2Pipeline, flux2),
    "flux2_klein": (Flux2KleinPipeline, flux2_klein),
    "z_image": (ZImagePipeline, z_image),
    "krea2": (Krea2Pipeline, krea2),
    "qwen_image": (QwenImagePipeline, qwen_image),
}
"""Name of a family to its stock pipeline and what makes the components."""

# Short prompts, so that short sequences will do; the others keep what their pipelines take.
CALL: dict[str, dict[str, Any]] = {
    "flux": {"max_sequence_length": 32, "guidance_scale": 3.5},
    "flux2": {"max_sequence_length": 64, "guidance_scale": 3.0},
    "flux2_klein": {"max_sequence_length": 48, "guidance_scale": 3.0},
    "z_image": {"max_sequence_length": 48, "guidance_scale": 3.0},
    "krea2": {"max_sequence_length": 32, "guidance_scale": 3.0},
    "qwen_image": {"true_cfg_scale": 3.0, "negative_prompt": "sand"},
}
"""What a call of each is given beside the prompt."""


@made_once
def tiny_parts(family: str, seed: int = 0) -> dict[str, Any]:
    """The components of a family's pipeline, and what else it is made with.

    Args:
        family: A key of `MADE`.
        seed: Of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = MADE[family][1]()
        _wake(parts["transformer"])
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.eval()
    return parts


def tiny_dit(family: str, cls: type | None = None, seed: int = 0) -> Any:
    """A pipeline of a family, fp32 on the CPU, without progress bar.

    Args:
        family: A key of `MADE`.
        cls: Another class than the stock one, with the same components.
        seed: Of the weights.
    """
    pipe: Any = (cls or MADE[family][0])(**tiny_parts(family, seed))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def _wake(transformer: nn.Module) -> None:
    """What begins as zero would hide that something reaches it, and so would blocks that add next to nothing."""
    for name, parameter in transformer.named_parameters():
        if "table" in name or "pad_token" in name:
            parameter.normal_(std=0.2)
        elif "stream_modulation" in name:
            parameter.mul_(5)


def denoiser_call(family: str, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The transformer of a family, and what its pipeline gives it in the first step, by name."""
    pipe = tiny_dit(family)
    calls: list[dict[str, Any]] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda model, args, given: calls.append(arguments(model, args, given)), with_kwargs=True
    )
    draw(pipe, family, num_inference_steps=1, **kwargs)
    handle.remove()
    return pipe.transformer, calls[0]


def draw(pipe: Any, family: str, prompt: Any = "a cat and a dog", *, seed: int = 0, **kwargs: Any) -> Any:
    """Latents of a two-step run."""
    given = {
        "num_inference_steps": 2,
        "height": SIZE,
        "width": SIZE,
        "output_type": "latent",
        "generator": torch.manual_seed(seed),
        **CALL[family],
    }
    return pipe(prompt=prompt, **{**given, **kwargs}).images
