"""`mole benchmark`: every way to compose, on the same prompts and seeds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..clip_names import open_clip_name
from ..drawing.opening import find_base, find_clip, find_folder, pick_device, quiet_loading
from .early import refuse_missing
from .edge import SOME_FAILED
from .inputs import Device, warnings_in_a_line

if TYPE_CHECKING:
    from mole_diffusion.benchmark.config import BenchmarkConfig

benchmark = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Compare compositions by the same prompts, seeds and scales.",
)

Config = Annotated[
    Path, typer.Argument(help="What to compare: a .yaml file, or one that comes along by its name, such as table1.")
]
Out = Annotated[Path | None, typer.Option(help="Folder of the benchmark [default: outputs/benchmark/NAME OF CONFIG].")]


@benchmark.command()
def run(config: Config, out: Out = None, device: Device = "auto") -> None:
    """Draw and measure every picture of a benchmark that is missing; train the gates it asks for first.

    Started again it goes on where it stopped. Several processes share the work under any launcher that sets RANK and
    WORLD_SIZE: `torchrun`, or `accelerate launch --multi_gpu --no_python`, with GPUs or without. (Without
    `--multi_gpu` accelerate starts a single process where there is no GPU.) A row that fails says why in its file, the
    rest goes on, and the exit code is 1.

    Examples:

    \b
      mole benchmark run table1
      torchrun --nproc-per-node 4 --no-python mole benchmark run benchmarks/table1.yaml --out runs/table1
    """
    settings = _read(config)
    _look_for_files(settings)
    local = os.environ.get("LOCAL_RANK")
    where = pick_device(device)
    if where.type == "cuda" and where.index is None and local is not None:
        where = pick_device(f"cuda:{local}")
    from mole_diffusion.benchmark import run_benchmark

    folder = _folder(config, out)
    with quiet_loading(), warnings_in_a_line():
        failed = run_benchmark(settings, folder, device=where, progress=True)
    typer.echo(f"rows: {folder / 'rows'}")
    if failed:
        typer.echo(f"mole: {failed} rows failed; each says why in its file below {folder / 'rows'}", err=True)
        raise typer.Exit(SOME_FAILED)


@benchmark.command()
def report(
    config: Config,
    out: Out = None,
    page: Annotated[
        Path | None, typer.Option(help="Also write it as NAME OF CONFIG.md, with small pictures, into this folder.")
    ] = None,
) -> None:
    """Write the tables, plots and picture sheets of a benchmark, of as much as there is.

    Examples:

    \b
      mole benchmark report benchmarks/table1.yaml
      mole benchmark report benchmarks/table1.yaml --page docs/results
    """
    settings = _read(config)
    from mole_diffusion.benchmark import write_report

    file = None if page is None else page / f"{config.stem}.md"
    path = write_report(settings, _folder(config, out), page=file)
    typer.echo(f"report: {path}")


def _read(config: Path) -> BenchmarkConfig:
    """What a benchmark compares. Raises MoLEError: There is no such file, or it is none of a benchmark."""
    if config.suffix:
        refuse_missing("config", [config])
    from mole_diffusion.benchmark.config import BenchmarkConfig
    from mole_diffusion.benchmark.studies import find_study

    return BenchmarkConfig.from_file(find_study(config))


def _look_for_files(settings: BenchmarkConfig) -> None:
    """Raises MoLEError where what a benchmark is made of is not there, as far as one sees without torch."""
    from mole_diffusion.benchmark.concepts import lora_file, reference_files

    for name in settings.used:
        lora_file(name, settings.concepts[name])
        reference_files(name, settings.concepts[name])
    find_base(settings.base)
    open_clip_name(*find_clip(settings.clip))
    if settings.image_encoder is not None:
        find_folder("image_encoder", settings.image_encoder, example="facebook/dinov2-base")


def _folder(config: Path, out: Path | None) -> Path:
    return out or Path("outputs/benchmark") / config.stem
