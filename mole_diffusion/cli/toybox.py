"""`mole toybox`: build or look at the embedded world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .inputs import Device, pick_device

toybox = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="The embedded world: a Stable Diffusion in miniature, its subjects and its LoRAs.",
)


@toybox.command()
def build(
    out: Annotated[Path, typer.Option(help="Folder for the result and its checkpoints.")] = Path("runs/toybox"),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Device = "auto",
) -> None:
    """Train the toybox from nothing. Hours on a CPU, minutes on a GPU; started again, it resumes.

    Example:

    \b
      mole toybox build --out runs/toybox --device cuda
    """
    from mole_diffusion.toybox import recipe

    recipe.build(out=out, seed=seed, device=pick_device(device))


@toybox.command()
def show(
    out: Annotated[Path, typer.Option(help="Where to write the picture sheet.")] = Path("outputs/toybox.png"),
) -> None:
    """Draw a sheet of the toybox's subjects.

    Example:

    \b
      mole toybox show --out subjects.png
    """
    from mole_diffusion import toybox as world

    world.show(out)
    typer.echo(f"picture sheet: {out}")
