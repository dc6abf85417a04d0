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
    base_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the base model; more make it better [default: the shipped one's]."),
    ] = None,
    compile_base: Annotated[
        bool, typer.Option("--compile", help="Compile the base for training: a fifth faster, needs a C++ compiler.")
    ] = False,
    reuse: Annotated[
        list[str] | None,
        typer.Option(help='Part to take from the installed toybox instead of training it: "vae" or "clip".'),
    ] = None,
    device: Device = "auto",
) -> None:
    """Train the toybox from nothing. Hours on a CPU, minutes on a GPU; started again, it resumes.

    The result lies in OUT/assets, as inside the package.

    Examples:

    \b
      mole toybox build --out runs/toybox
      mole toybox build --out runs/toybox --device cuda --base-steps 60000
      mole toybox build --out runs/toybox --reuse vae --reuse clip --compile
    """
    from mole_diffusion.files import in_use, try_folder

    try_folder(out)
    from mole_diffusion.toybox import recipe

    effort = recipe.Effort() if base_steps is None else recipe.Effort(base_steps=base_steps)
    where = pick_device(device)
    with in_use(out):
        assets = recipe.build(
            out, seed=seed, device=where, effort=effort, compile_model=compile_base, reuse=reuse or ()
        )
    typer.echo(f"toybox: {assets}")


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
