"""`mole toybox`: build or look at the embedded world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mole_diffusion.choices import REUSABLE
from mole_diffusion.errors import MoLEError

from ..drawing.opening import find_base, pick_device, quiet_loading
from ..drawing.settings import LARGEST_SEED
from .early import refuse_missing, refuse_other
from .inputs import Base, Device

MOST = 10**9

toybox = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="The embedded world: a Stable Diffusion in miniature, its subjects and its LoRAs.",
)


@toybox.command()
def build(
    out: Annotated[Path, typer.Option(help="Folder for the result and its checkpoints.")] = Path("runs/toybox"),
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of everything random.")] = 0,
    vae_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST,
            help="Steps of the autoencoder [default: 2600]; with --reuse vae, of its decoder alone [default: none].",
        ),
    ] = None,
    vae_batch: Annotated[int, typer.Option(min=1, max=MOST, help="Pictures in a step of the autoencoder.")] = 16,
    base_steps: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST, help="Steps of the base model; more make it better [default: the shipped one's]."
        ),
    ] = None,
    base_batch: Annotated[
        int,
        typer.Option(
            min=1, max=MOST, help="Scenes in a step of the base; the learning rate grows with the root of it, to 2e-3."
        ),
    ] = 32,
    scenes: Annotated[int, typer.Option(min=1, max=MOST, help="Different scenes that the base sees.")] = 40960,
    clip_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST,
            help="Steps of CLIP [default: 2500]; with --reuse clip, to train it on for [default: none].",
        ),
    ] = None,
    compile_base: Annotated[
        bool, typer.Option("--compile", help="Compile the base for training: a fifth faster, needs a C++ compiler.")
    ] = False,
    reuse: Annotated[
        list[str] | None,
        typer.Option(
            help='Part to take from the installed toybox instead of training it: "vae" or "clip"; "base" trains it on.'
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Train the toybox from nothing, or its base on. Hours on a CPU, minutes on a GPU; started again, it resumes.

    The result lies in OUT/assets, as inside the package.

    Examples:

    \b
      mole toybox build --out runs/toybox
      mole toybox build --out runs/toybox --device cuda --base-steps 60000
      mole toybox build --out runs/toybox --reuse vae --reuse clip --compile
      mole toybox build --out runs/longer --reuse base --reuse clip --base-steps 3000 --clip-steps 2400
    """
    from mole_diffusion.files import in_use, try_folder

    for part in reuse or ():
        refuse_other("--reuse", part, REUSABLE)
    try_folder(out)
    where = pick_device(device)
    from mole_diffusion.toybox import recipe

    effort = recipe.Effort(
        vae_steps=vae_steps, vae_batch=vae_batch, base_batch=base_batch, num_scenes=scenes, clip_steps=clip_steps
    )
    if base_steps is not None:
        effort = replace(effort, base_steps=base_steps)
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


@toybox.command()
def measure(
    assets: Annotated[
        Path | None,
        typer.Option(help="Folder of a built toybox, such as runs/toybox/assets [default: the shipped one]."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where to write the numbers.")] = Path("outputs/report.json"),
    pictures: Annotated[
        int, typer.Option(min=1, max=MOST, help="Pictures a row; a quarter of it for every subject.")
    ] = 200,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the prompts and of the noise.")] = 0,
    device: Device = "auto",
) -> None:
    """Measure a toybox by its oracle: base, LoRAs alone and in company, CLIP.

    An hour or more on a CPU; started again, it resumes.

    Examples:

    \b
      mole toybox measure --pictures 20 --out outputs/report.json
      mole toybox measure --assets runs/toybox/assets --out runs/toybox/report.json
    """
    from mole_diffusion import toybox as world
    from mole_diffusion.files import try_file, write_json, write_last

    refuse_missing("--assets", [] if assets is None else [assets])
    try_file(out)
    part = out.with_name(f"{out.name}.part")
    folder = world.base_dir().parent if assets is None else assets
    missing = [name for name in ("base", "loras", "clip") if not (folder / name).is_dir()]
    if missing:
        raise MoLEError(
            f"--assets {folder}: no toybox, for it lacks {' and '.join(missing)}. Make one with mole toybox build."
        )
    where = pick_device(device)
    from mole_diffusion.toybox.recipe.measure import measure as measure_toybox

    with quiet_loading():
        report = measure_toybox(folder, seed=seed, device=where, num_pictures=pictures, part=part)
    write_last(out, lambda path: write_json(path, report))
    part.unlink(missing_ok=True)
    typer.echo(f"numbers: {out}")


@toybox.command()
def anonymous(
    out: Annotated[Path, typer.Option(help="Folder for the subjects, one folder each.")] = Path("runs/anonymous"),
    count: Annotated[int, typer.Option(help="How many; the first sixteen are of sixteen classes.")] = 24,
    steps: Annotated[int, typer.Option(min=1, max=MOST, help="Optimiser steps of each LoRA.")] = 600,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the looks and of the trainings.")] = 0,
    base: Base = "toybox",
    device: Device = "auto",
) -> None:
    """Make subjects that have no name: looks that nothing was tuned on, each with a LoRA. Started again, it resumes.

    Each folder gets lora.safetensors, five reference pictures and subject.json with name, token, class and look;
    `toybox.anonymous_subjects(OUT)` reads them.

    Examples:

    \b
      mole toybox anonymous --count 24 --out runs/anonymous
      mole toybox anonymous --base runs/toybox/assets/base --count 6 --seed 1 --out runs/six
    """
    from mole_diffusion.files import in_use, try_folder
    from mole_diffusion.toybox.anonymous import SUBJECT_FILE, draw_anonymous, read_subject

    try_folder(out)
    found, where = find_base(base), pick_device(device)
    for item in draw_anonymous(count, seed):
        file = out / item.name / SUBJECT_FILE
        if file.exists() and read_subject(file) != item:
            raise MoLEError(f"{file} is of another subject, made with another --seed. Choose another folder.")
    from mole_diffusion.pipelines import pipeline_class

    pipeline_class(found)  # says what is wrong with it
    from mole_diffusion.toybox.recipe.anonymous import make_anonymous

    with quiet_loading(), in_use(out):
        subjects = make_anonymous(found, out, count=count, seed=seed, device=where, num_steps=steps)
    for item in subjects:
        typer.echo(f"{item.name}: {item.token} {item.class_name}, {item.look}")
