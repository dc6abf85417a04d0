"""Whole steps of gate training by the preset `real`: walk, autoencoder, CLIP, update; random weights, real shapes."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from .. import toybox
from ..clip import DifferentiableCLIP
from ..pipelines import MoLEStableDiffusionPipeline
from ..training import Concept, GateTrainingConfig, train_gates
from .clocks import on_gpu, wait
from .config import SIZES, SpeedConfig
from .models import make_loras, make_model

STEPS = 3  # the first makes what is made once


@dataclass(frozen=True)
class WalkCost:
    """Steps of `train_gates`.

    Attributes:
        pixels: Side of the pictures.
        seconds: Of a step by the clock, median.
        peak: GiB of all tensors at the peak, weights and all, on a GPU; `None` on a CPU.
    """

    pixels: int
    seconds: float
    peak: float | None


def walk_cost(config: SpeedConfig, number: int) -> WalkCost:
    """Trains gates for a few steps by the preset `real`.

    Args:
        config: What is measured; its size is one with the models of a whole pipeline, see `OTHERS`.
        number: Of LoRAs.
    """
    pipe = _pipeline(config)
    names = toybox.subjects()[:number]
    pipe.load_loras(dict(zip(names, make_loras(config, pipe.unet, number), strict=True)))
    pixels = (config.latent or SIZES[config.size].latent) * pipe.vae_scale_factor
    picture = Image.new("RGB", (pixels, pixels), "grey")
    concepts = {
        name: Concept(token=toybox.token(name), class_name=toybox.class_name(name), references=[picture])
        for name in names
    }
    prompt = " and ".join(f"a {one.token} {one.class_name}" for one in concepts.values())
    training = GateTrainingConfig.from_dict({"steps": STEPS, "warmup_steps": 1, "resolution": pixels}, "real")
    ends: list[float] = []

    def ended(step: int, numbers: Mapping[str, float]) -> None:
        wait(config.device)
        ends.append(time.perf_counter())

    clip = _clip(config).to(config.device)
    if on_gpu(config.device):
        torch.cuda.reset_peak_memory_stats(config.device)
    train_gates(pipe, training, prompts=[prompt], clip=clip, concepts=concepts, progress=False, on_step_end=ended)
    peak = torch.cuda.max_memory_allocated(config.device) / 2**30 if on_gpu(config.device) else None
    pipe.unload_loras()
    return WalkCost(pixels, float(np.median(np.diff(ends))), peak)


@dataclass(frozen=True)
class Others:
    """The models of a pipeline beside its denoiser, and the CLIP that guides.

    Attributes:
        vae: Channels of the autoencoder's blocks.
        groups: Of its norms.
        text_layers: Of the text encoder.
        clip: An architecture of open_clip, or what one is made of.
    """

    vae: tuple[int, ...]
    groups: int
    text_layers: int
    clip: str | dict[str, Any]


_SMALL_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1},
}
OTHERS = {
    "tiny": Others((16, 32), 8, 1, _SMALL_CLIP),
    "sd15": Others((128, 256, 512, 512), 32, 12, "ViT-B-32"),
}
"""By size: Stable Diffusion 1.5's own."""


def _pipeline(config: SpeedConfig) -> MoLEStableDiffusionPipeline:
    others, size = OTHERS[config.size], SIZES[config.size]
    unet = make_model(config)
    tokenizer = AutoTokenizer.from_pretrained(toybox.base_dir() / "tokenizer", model_max_length=77)
    levels = len(others.vae)
    with torch.random.fork_rng(), torch.device(config.device):
        vae = AutoencoderKL(
            block_out_channels=others.vae,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=2,
            norm_num_groups=others.groups,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=size.width,
                intermediate_size=4 * size.width,
                num_hidden_layers=others.text_layers,
                num_attention_heads=size.width // 32,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    pipe = MoLEStableDiffusionPipeline(
        vae=vae.eval().to(unet.dtype),
        text_encoder=text_encoder.eval().to(unet.dtype),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_pretrained(toybox.base_dir() / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe.to(config.device)


def _clip(config: SpeedConfig) -> DifferentiableCLIP:
    """A CLIP of random weights, which open_clip opens from a folder alone."""
    named = OTHERS[config.size].clip
    made_of = open_clip.get_model_config(named) if isinstance(named, str) else named
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        about = {"model_cfg": made_of, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(about), encoding="utf-8")
        with torch.random.fork_rng():
            model = open_clip.CLIP(**made_of)
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / "open_clip_model.safetensors")
        return DifferentiableCLIP(folder)
