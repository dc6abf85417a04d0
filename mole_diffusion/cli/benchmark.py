"""`mole benchmark`: every way to compose, on the same prompts and seeds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..drawing.opening import pick_device, quiet_loading
from .early import refuse_missing
from .edge import SOME_FAILED
from .inputs import Device, warnings_in_a_line

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
    _look_at(config)
    pick_device(device)
    from mole_diffusion.benchmark import BenchmarkConfig, run_benchmark
    from mole_diffusion.benchmark.studies import find_study

    settings = BenchmarkConfig.from_file(find_study(config))
    local = os.environ.get("LOCAL_RANK")
    where = pick_device(device)
    if where.type == "cuda" and where.index is None and local is not None:
        where = pick_device(f"cuda:{local}")
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
    _look_at(config)
    from mole_diffusion.benchmark import BenchmarkConfig, write_report
    from mole_diffusion.benchmark.studies import find_study

    file = None if page is None else page / f"{config.stem}.md"
    path = write_report(BenchmarkConfig.from_file(find_study(config)), _folder(config, out), page=file)
    typer.echo(f"report: {path}")


def _look_at(config: Path) -> None:
    """Raises MoLEError for a file that is not there, or no YAML; what it says is read later, with the benchmark."""
    if config.suffix:
        from mole_diffusion.yaml_files import read_yaml

        refuse_missing("config", [config])
        read_yaml(config)


def _folder(config: Path, out: Path | None) -> Path:
    return out or Path("outputs/benchmark") / config.stem
