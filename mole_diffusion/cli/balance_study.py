"""`mole balance-study`: the balance loss beside no balance loss and raised temperatures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..drawing.opening import pick_device
from . import gate_options as given
from .gate_inputs import GateArguments
from .gate_settings import read_config
from .inputs import Base, BaseDtype, Device


def balance_study(
    lora: given.Lora,
    out: Annotated[Path, typer.Option(help="Folder for tables, plots and all the gates.")],
    temperature: Annotated[
        list[float] | None, typer.Option(help="A raised temperature; once for each [default: 2, 5 and 10]")
    ] = None,
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
    device: Device = "auto",
    dtype: BaseDtype = "float32",
) -> None:
    """Train gates with the balance loss, without it, and with raised temperatures, and compare them.

    The paper's Figure 5 and Table 7: entropy of the gates while training, mean weight of every LoRA, losses.

    Example:

    \b
      mole balance-study --lora cat=cat.safetensors --lora boot=boot.safetensors \\
          --token "cat=<v1>" --class cat=cat --token "boot=<v2>" --class boot=boot \\
          --template "a photo of {concepts} on grass" --temperature 2 --temperature 10 --out study
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
    arguments.look_first()
    options = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    chosen = read_config(preset, config, settings, options)
    from mole_diffusion.benchmark.variants import TEMPERATURES, variants

    temperatures = temperature or TEMPERATURES
    variants(chosen, temperatures)  # before torch is imported
    pick_device(device)
    inputs = arguments.read(chosen)
    from mole_diffusion.benchmark import balance_study as study

    study(
        inputs.pipe,
        inputs.config,
        prompts=inputs.prompts,
        clip=inputs.clip,
        concepts=inputs.concepts,
        temperatures=temperatures,
        out=out,
    )
    typer.echo((out / "study.md").read_text(encoding="utf-8"))
    typer.echo(f"study: {out}")
