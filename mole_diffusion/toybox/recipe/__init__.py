"""How the toybox is made: autoencoder, text encoder, base, CLIP, subject LoRAs, gates, and how good they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from mole_diffusion.choices import REUSABLE
from mole_diffusion.errors import MoLEError
from mole_diffusion.families.names import TEXT_MODEL
from mole_diffusion.files import write_json, write_safetensors

from .. import base_dir
from ..subjects import SUBJECTS
from . import base, clip, gates, loras, measure, vae
from .text_encoder import train_text_encoder
from .tokenizer import make_tokenizer


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Steps and batch sizes of every training, and pictures a row when measuring; the defaults made what ships.

    `vae_steps` and `clip_steps` are `None` for the steps from nothing, and for none where the installed one is taken
    over.
    """

    vae_steps: int | None = None
    vae_batch: int = 16
    words_steps: int = 600
    words_batch: int = 64
    base_steps: int = 9000
    base_batch: int = 32
    num_scenes: int = 40960
    clip_steps: int | None = None
    clip_batch: int = 32
    lora_steps: int = 600
    gate_steps: int = 40
    pictures: int = 200


def build(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    effort: Effort | None = None,
    compile_model: bool = False,
    reuse: Collection[str] = (),
) -> Path:
    """Trains the toybox from nothing, or goes on where an earlier run was interrupted.

    Args:
        out: Folder for checkpoints; the result lies in its `assets`.
        seed: Seed of everything random.
        device: Where to train.
        effort: How many steps each training takes.
        compile_model: Compile the base for training; a fifth faster on CPU, after two minutes of compiling.
        reuse: Which of `REUSABLE` to take from the installed toybox instead of training it. "base" goes on from the
            installed denoiser and text encoder for `effort.base_steps` more steps, with the installed autoencoder;
            "clip" goes on from the installed one for `effort.clip_steps` more and "vae" trains the decoder on for
            `effort.vae_steps`, if these are given.

    Returns:
        The `assets` folder, laid out as inside the package.

    Raises:
        MoLEError: `reuse` names something else.
    """
    unknown = sorted(set(reuse) - set(REUSABLE))
    if unknown:
        raise MoLEError(f"cannot reuse {unknown}; parts that can be taken over are {list(REUSABLE)}.")
    work, effort, device = Path(out), effort or Effort(), torch.device(device)
    assets, installed = work / "assets", base_dir().parent
    work.mkdir(parents=True, exist_ok=True)

    autoencoder = None
    if "vae" in reuse or "base" in reuse:
        autoencoder = vae.load_vae(installed / "base" / "vae").to(device)
    if autoencoder is None or effort.vae_steps is not None:
        autoencoder = vae.train_vae(
            work,
            seed=seed,
            device=device,
            num_steps=effort.vae_steps or vae.NUM_STEPS,
            batch_size=effort.vae_batch,
            start=autoencoder,
        )
    tokenizer = make_tokenizer()
    start = None
    if "base" in reuse:
        start, text_encoder = base.load_base(installed / "base", tokenizer)
    else:
        text_encoder = train_text_encoder(
            tokenizer, work, seed=seed, device=device, num_steps=effort.words_steps, batch_size=effort.words_batch
        )
    unet = base.train_base(
        autoencoder,
        text_encoder,
        tokenizer,
        work,
        seed=seed,
        device=device,
        num_steps=effort.base_steps,
        batch_size=effort.base_batch,
        num_scenes=effort.num_scenes,
        compile_model=compile_model,
        start=start,
    )
    save_base(assets / "base", autoencoder, unet, text_encoder, tokenizer)
    if "clip" in reuse and effort.clip_steps is None:
        shutil.copytree(installed / "clip", assets / "clip", dirs_exist_ok=True)
    else:
        clip.train_clip(
            assets / "clip",
            work,
            seed=seed,
            device=device,
            num_steps=effort.clip_steps or clip.NUM_STEPS,
            batch_size=effort.clip_batch,
            start=installed / "clip" if "clip" in reuse else None,
        )
    for name in SUBJECTS:
        pipe = StableDiffusionPipeline.from_pretrained(assets / "base").to(device)
        loras.train_subject(pipe, name, assets, work, seed=seed, num_steps=effort.lora_steps)
    for names in gates.SETS:
        gates.train_set(names, assets, work, seed=seed, device=device, num_steps=effort.gate_steps)
    report = measure.measure(
        assets, seed=seed, device=device, num_pictures=effort.pictures, part=work / "report.json.part"
    )
    write_json(assets / "report.json", report)
    return assets


def save_base(
    folder: Path,
    autoencoder: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Writes a stock Stable Diffusion folder; weights in half precision."""
    pipe = StableDiffusionPipeline(
        vae=autoencoder.half(),
        text_encoder=text_encoder,  # transformers would run it in the precision of the file
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=base.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    # As in Stable Diffusion's own files. Newer versions of transformers write names without it, and older ones, which
    # do not find those, would leave the text encoder random.
    file = folder / "text_encoder" / "model.safetensors"
    named = {TEXT_MODEL + key.removeprefix(TEXT_MODEL): tensor for key, tensor in load_file(file).items()}
    write_safetensors(file, named, {"format": "pt"})
