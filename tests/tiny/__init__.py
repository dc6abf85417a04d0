"""A random Stable Diffusion small enough to draw a picture in a fraction of a second, and random LoRAs for it.

Everything is deterministic in its seed and touches neither the network nor the disk.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.tiny.copies import made_once

WORDS = "a an and of on the in with photo picture red blue green cat dog mug boot robot clock grass sand".split()
MAX_TOKENS = 16
HIDDEN = 32

ATTENTION = r"attn[12]\.to_(q|k|v|out\.0)$"
FEED_FORWARD = r"\.ff\.net\.(0\.proj|2)$"
PROJECTIONS = r"\.proj_(in|out)$"
CONVOLUTIONS = r"\.(conv1|conv2|conv_shortcut|conv)$"
TEXT_ENCODER = r"\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$"
"""Regular expressions over module names, for `random_lora(targets=...)`."""


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows `WORDS` as one token each and spells everything else in ASCII."""
    characters = [c for c in string.printable if not c.isspace()]
    vocab = {token: i for i, token in enumerate(characters + [c + "</w>" for c in characters])}
    merges = learn_merges(vocab, [[*word[:-1], word[-1] + "</w>"] for word in WORDS])
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def learn_merges(vocab: dict[str, int], words: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """Merges that make each of the words, given by their letters, one token; `vocab` gets what they make."""
    merges: list[tuple[str, str]] = []
    for letters in words:
        pieces = list(letters)
        for pair in merges:  # what earlier words already join; later merges cannot come before these
            pieces = _join(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _join(pieces, merges[-1])
            vocab.setdefault(merges[-1][0] + merges[-1][1], len(vocab))
    return merges


def _join(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """`pieces` with every neighbouring `pair` made one piece, as byte-pair encoding does."""
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """Of a CLIP text encoder of two layers that reads what the tokenizer writes."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@made_once
def tiny_components(seed: int = 0) -> dict[str, Any]:
    """A random Stable Diffusion of 32x32 pixels: `vae`, `text_encoder`, `tokenizer`, `unet`, `scheduler`.

    The UNet has channels (32, 64) and one layer a block; as in Stable Diffusion 1.5, the blocks of the lowest level
    have no attention, and the one in the middle has. The text encoder is two layers of width 32. Models are in eval
    mode, fp32, on the CPU.
    """
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=HIDDEN,
            attention_head_dim=8,
        )
        text_encoder = CLIPTextModel(text_config(tokenizer, HIDDEN))
        vae = AutoencoderKL(
            sample_size=32,
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            norm_num_groups=8,
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return {
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "unet": unet.eval(),
        "scheduler": scheduler,
    }


def tiny_pipeline(cls: type = StableDiffusionPipeline, seed: int = 0) -> Any:
    """A pipeline of class `cls` around `tiny_components(seed)`, without safety checker and progress bar."""
    pipe = cls(**tiny_components(seed), safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_lora(
    components: Mapping[str, Any],
    rank: int = 4,
    targets: Sequence[str] | str = (ATTENTION, TEXT_ENCODER),
    alpha: float | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A random LoRA in the diffusers/PEFT layout: `unet.<module>.lora_A.weight`, `….lora_B.weight`.

    Args:
        components: As from `tiny_components`; modules of `unet`, `text_encoder` and the like are looked at.
        rank: r of every pair. A convolution gets a down factor of its kernel's size and a 1x1 up factor.
        targets: Regular expressions searched for in `<component>.<module>`; a module that matches any gets a pair.
        alpha: If given, written as `<component>.<module>.alpha`, so that scaling is `alpha / rank`.
        seed: Of the factors. They are large enough to change outputs visibly.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for component in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        model = components.get(component)
        if not isinstance(model, nn.Module):
            continue
        for name, module in model.named_modules():
            path = f"{component}.{name}"
            if not isinstance(module, nn.Linear | nn.Conv2d) or not any(re.search(p, path) for p in patterns):
                continue
            out_features, *rest = module.weight.shape
            fan_in = module.weight[0].numel()
            down = torch.randn(rank, *rest, generator=generator) / fan_in**0.5
            up = torch.randn(out_features, rank, *[1] * (len(rest) - 1), generator=generator) / rank**0.5
            state[f"{path}.lora_A.weight"] = down
            state[f"{path}.lora_B.weight"] = 0.3 * up
            if alpha is not None:
                state[f"{path}.alpha"] = torch.tensor(float(alpha))
    if not state:
        raise ValueError(f"no Linear or Conv2d of {sorted(components)} matches targets {patterns}")
    return state
