"""`mole evaluate`: alignment of pictures from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..drawing.opening import find_clip, find_folder, pick_device, quiet_loading
from ..errors import MoLEError
from .early import refuse_missing, refuse_missing_clip, refuse_unknown_clip
from .edge import SOME_FAILED
from .inputs import Device, read_paths, warnings_in_a_line


def evaluate(
    images: Annotated[Path, typer.Option(help="Folder of pictures.")],
    prompts: Annotated[
        Path,
        typer.Option(help="Text file: a prompt a line, 2.png before 10.png, or one for all; or JSON by name."),
    ],
    references: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="Pictures of a concept; once for each.")
    ] = None,
    clip: Annotated[
        str, typer.Option(help='"toybox", a folder in open_clip\'s format, or architecture:weights.')
    ] = "ViT-B-32:openai",
    image_encoder: Annotated[
        str | None, typer.Option(help="Vision model of transformers for image alignment, say DINOv2 [default: CLIP].")
    ] = None,
    out: Annotated[Path, typer.Option(help="Table with a row per picture, .csv.")] = Path("evaluation.csv"),
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 32,
    device: Device = "auto",
) -> None:
    """Measure how well pictures fit their prompts and the pictures of each concept.

    A picture that cannot be read is named, the others are measured, and the exit code is 1.

    Examples:

    \b
      mole evaluate --images ./pictures --prompts prompts.txt --references cat=./cat --references boot=./boot
      mole evaluate --images ./pictures --prompts prompts.json --references cat=./cat \\
          --image-encoder facebook/dinov2-base --out cats.csv
    """
    folders = read_paths("--references", references or [])
    if out.suffix.lower() != ".csv":
        raise MoLEError(f"--out {out}: the table is written as .csv, got {out.suffix!r}.")
    from mole_diffusion.files import try_file, write_last
    from mole_diffusion.pictures import picture_files
    from mole_diffusion.prompts import read_prompts

    try_file(out)
    refuse_missing("--images", [images])
    refuse_missing("--prompts", [prompts])
    refuse_missing("--references", folders.values())
    refuse_missing_clip(clip)
    refuse_unknown_clip(*find_clip(clip))
    encoder_found = image_encoder and find_folder("--image-encoder", image_encoder, example="facebook/dinov2-base")
    read_prompts(prompts, [file.name for file in picture_files(images)])  # looked at before torch is imported
    where = pick_device(device)
    from rich.console import Console
    from rich.table import Table

    from mole_diffusion.metrics import VisionBackbone, evaluate_folder, load_clip
    from mole_diffusion.metrics.folder import read_inputs
    from mole_diffusion.tables import write_csv

    read_inputs(images, prompts, folders)
    with quiet_loading():
        encoder = None if encoder_found is None else VisionBackbone.from_pretrained(encoder_found).to(where)
        model = load_clip(clip).to(where)
    with warnings_in_a_line():
        result = evaluate_folder(
            images, prompts, folders, model, image_encoder=encoder, batch_size=batch_size, progress=True
        )
    write_last(out, lambda path: write_csv(path, result.rows))
    table = Table("", "mean", title=f"{len(result.rows)} pictures", title_justify="left")
    for name, value in result.means.items():
        table.add_row(name, f"{value:.4f}")
    Console(markup=False, highlight=False).print(table)
    typer.echo(f"table: {out}")
    for reason in result.failures.values():
        typer.echo(f"mole: {reason}", err=True)
    if result.failures:
        raise typer.Exit(SOME_FAILED)
