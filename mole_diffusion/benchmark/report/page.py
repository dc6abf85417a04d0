"""The report of a benchmark: Markdown, CSV and pictures."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mole_diffusion.benchmark.config import BenchmarkConfig
from mole_diffusion.benchmark.gates import SECONDS, gates_folder
from mole_diffusion.benchmark.inputs import shown, without_paths
from mole_diffusion.benchmark.report import tables
from mole_diffusion.benchmark.report.paper import paper_section
from mole_diffusion.benchmark.report.plots import draw_gates, draw_scatter, draw_sheet
from mole_diffusion.benchmark.row import Row
from mole_diffusion.benchmark.run import read_rows
from mole_diffusion.errors import MoLEError
from mole_diffusion.files import atomic_path, file_name, try_file, try_folder
from mole_diffusion.reading import read_text
from mole_diffusion.tables import write_csv

SHEETS_SHOWN = 3


def write_report(
    config: BenchmarkConfig, out: str | os.PathLike[str], *, page: str | os.PathLike[str] | None = None
) -> Path:
    """Writes the report with its tables, plots and a sheet of pictures per composition, of as much as there is.

    Args:
        config: The benchmark.
        out: Its folder; into `report/` there go `report.md`, `rows.csv`, `methods.csv`, `scatter.png`, a sheet for
            each composition and a heat map for each composition and method with gates.
        page: Also write the report to this Markdown file, with the pictures it shows in a folder of the same name
            beside it, reduced to 256 colours.

    Returns:
        Path of `report.md`, or of the page.

    Raises:
        MoLEError: There is not one row that was measured, `page` is another file, or the paper's table cannot be read.
    """
    folder = Path(out) / "report"
    try_folder(folder)
    if page is not None:
        _check_page(Path(page))
    rows = [_to_be_shared(row) for row in read_rows(config, out)]
    good = [row for row in rows if row.error is None]
    if not good:
        why = f" The first error: {rows[0].error}" if rows else " Run `mole benchmark run` first."
        raise MoLEError(f"{os.fspath(out)} has no measured row.{why}")
    write_csv(folder / "rows.csv", [_flat(row) for row in rows])
    write_csv(folder / "methods.csv", tables.means_by_method(config, good))
    draw_scatter(config, good, folder / "scatter.png")
    sheets, heat_maps = _sheets(config, out, folder), _heat_maps(config, good, folder)
    parts = [
        f"# {config.name}\n",
        _setting(config, rows),
        "## Methods\n",
        "Means over pictures.\n",
        tables.method_table(config, good),
        tables.difference_table(config, good),
        tables.count_table(config, good),
        paper_section(config, good),
        tables.correlation_table(config, good),
        _picture(folder / "scatter.png", "text against image alignment"),
        "## Wins\n",
        "In how many compositions a method has the best mean; ties share.\n",
        tables.wins_table(config, good),
        "## Cost of a picture\n",
        tables.cost_table(config, good, _training_minutes(config, Path(out))),
        "## Compositions\n",
        tables.loras_tables(config, good),
        "## Gates\n" if heat_maps else "",
        *(_picture(path, path.stem) for path in heat_maps),
        "## Pictures\n",
        *(_picture(path, path.stem) for path in sheets[:SHEETS_SHOWN]),
        f"The first {SHEETS_SHOWN} of {len(sheets)} compositions.\n" if len(sheets) > SHEETS_SHOWN else "",
        tables.failure_table(rows),
    ]
    text = "\n".join(part for part in parts if part)
    with atomic_path(folder / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    if page is None:
        return folder / "report.md"
    shown = [folder / "scatter.png", *heat_maps, *sheets[:SHEETS_SHOWN]]
    return _write_page(text, shown, Path(page))


def _check_page(page: Path) -> None:
    """Raises MoLEError where a file stands in the page's place that is none."""
    try_file(page)
    if page.exists() and not _is_page(page):
        raise MoLEError(f"{page} is no page of a benchmark, and would be replaced. Choose another folder.")


def _is_page(page: Path) -> bool:
    try:
        return "## Methods\n" in read_text(page)
    except MoLEError:
        return False


def _write_page(text: str, pictures: Sequence[Path], page: Path) -> Path:
    for path in pictures:
        with Image.open(path) as picture, atomic_path(page.with_suffix("") / path.name) as temporary:
            picture.convert("RGB").quantize(256).save(temporary, optimize=True)
        text = text.replace(f"]({_link(path.name)})", f"]({_link(f'{page.stem}/{path.name}')})")
    with atomic_path(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return page


def _setting(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    failed = sum(row.error is not None for row in rows)
    trained = [method for method in config.methods if method.training is not None]
    steps = sorted({method.training.steps for method in trained if method.training is not None})
    return (
        f"{len(config.compositions)} compositions, {len(config.prompts)} prompts, {len(config.seeds)} seeds, "
        + ("" if config.resolution is None else f"{config.resolution}×{config.resolution} pixels, ")
        + f"{config.steps} steps, guidance {config.guidance_scale:g}, scale {config.scale:g}, "
        f"base {shown(config.base)}, "
        f"CLIP {shown(config.clip)}. {len(rows) - failed} pictures measured, {failed} failed, "
        f"{len(config.cells()) - len(rows)} missing."
        + (
            f" Gates of {', '.join(method.label for method in trained)} were trained for each composition, "
            f"{' or '.join(str(count) for count in steps)} steps, on prompts that are not measured."
            if trained
            else ""
        )
        + "\n"
    )


def _to_be_shared(row: Row) -> Row:
    return row if row.error is None else dataclasses.replace(row, error=without_paths(row.error))


def _flat(row: Row) -> dict[str, Any]:
    """A row for CSV, without its gates."""
    values = dataclasses.asdict(row)
    numbers, by_concept, error = values.pop("numbers"), values.pop("image_by_concept"), values.pop("error")
    del values["gates"]
    values |= numbers | {f"image: {name}": value for name, value in by_concept.items()}
    return values if error is None else values | {"error": error}


def _sheets(config: BenchmarkConfig, out: str | os.PathLike[str], folder: Path) -> list[Path]:
    paths = {folder / f"{file_name('+'.join(names))}.png": names for names in config.compositions}
    return [path for path, names in paths.items() if draw_sheet(config, out, names, path)]


def _heat_maps(config: BenchmarkConfig, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws one for each composition and method with gates; returns those of the first composition that has any."""
    shown: list[Path] = []
    for names in config.compositions:
        composition = "+".join(names)
        paths = {label: folder / f"{file_name(f'gates-{label}-{composition}')}.png" for label in config.labels}
        drawn = [path for label, path in paths.items() if draw_gates(rows, label, composition, path)]
        shown = shown or drawn
    return shown


def _training_minutes(config: BenchmarkConfig, out: Path) -> dict[str, float]:
    """By method, what the training of its gates took, as far as it is known."""
    minutes: dict[str, float] = {}
    for method in config.methods:
        for names in config.compositions if method.training is not None else []:
            path = gates_folder(config, out, "+".join(names), method) / SECONDS
            if path.is_file():
                try:
                    seconds = float(json.loads(path.read_text(encoding="utf-8")))
                except (OSError, ValueError, TypeError):  # damaged: not known
                    continue
                minutes[method.label] = minutes.get(method.label, 0.0) + seconds / 60
    return minutes


def _picture(path: Path, name: str) -> str:
    return f"![{name}]({_link(path.name)})\n"


def _link(path: str) -> str:
    return f"<{path}>" if " " in path else path
