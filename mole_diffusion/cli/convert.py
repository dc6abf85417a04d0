"""`mole convert`: a LoRA file in another program's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mole_diffusion.choices import LAYOUTS

from ..drawing.opening import find_base
from .early import refuse_missing, refuse_other


def convert(
    file: Annotated[Path, typer.Argument(help="A LoRA, .safetensors, or its folder.")],
    to: Annotated[str, typer.Option(help="diffusers, kohya or peft.")],
    out: Annotated[Path, typer.Option(help="A .safetensors file; for peft a folder that is not there yet.")],
    base: Annotated[
        str | None,
        typer.Option(help="Base model to look names up in, where it is none of the published ones: a folder."),
    ] = None,
) -> None:
    """Write a LoRA file in another layout: the same numbers, alphas and effect.

    Examples:

    \b
      mole convert cat.safetensors --to kohya --out cat-kohya.safetensors
      mole convert flux.safetensors --to peft --out adapter
    """
    refuse_missing("FILE", [file])
    refuse_other("--to", to, LAYOUTS)
    if base is not None:
        find_base(base)
    from mole_diffusion.lora import convert_lora

    from .inspect import read_models

    given: Any = to
    convert_lora(file, out, given, None if base is None else read_models(base))
    typer.echo(str(out))
