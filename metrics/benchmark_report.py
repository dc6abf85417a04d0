"""The report of a benchmark: Markdown, CSV and pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_path
from ..sheets import picture_sheet
from .alignment import text_name
from .benchmark_config import BenchmarkConfig, Cell
from .benchmark_run import picture_path, read_rows
from .compare import correlation, paired_bootstrap, wins
from .pictures import read_picture
from .tables import markdown_table, number, write_csv

TEXT = text_name("clipscore")
IMAGE = "image alignment"
HIGHER_IS_BETTER = {
    TEXT: True,
    text_name("cosine"): True,
    IMAGE: True,
    "region alignment": True,
    "detection rate": True,
    "all-present rate": True,
    "presence rate": True,
    "omission rate": False,
    "confusion rate": False,
    "count error": False,
}
TRUTHS = ("all-present rate", "omission rate", "confusion rate")
COLUMNS_OF_A_SHEET = 6

Row = dict[str, Any]


def write_report(config: BenchmarkConfig, out: str | os.PathLike[str]) -> Path:
    """Writes `report.md` with its tables, `rows.csv`, `methods.csv`, `scatter.png` and a sheet per composition.

    Args:
        config: The benchmark.
        out: Its folder; the report goes into `report/` there.

    Returns:
        Path of `report.md`.

    Raises:
        ValueError: There is not one row that was measured.
    """
    folder = Path(out) / "report"
    rows = read_rows(config, out)
    good = [row for row in rows if "error" not in row]
    if not good:
        why = f" The first error: {rows[0]['error']}" if rows else " Run `mole benchmark run` first."
        raise ValueError(f"{os.fspath(out)} has no measured row.{why}")
    measures = [name for name in HIGHER_IS_BETTER if any(name in row for row in good)]
    write_csv(folder / "rows.csv", [_flat(row) for row in rows])
    write_csv(folder / "methods.csv", _by_method(config, good, measures))
    _scatter(config, good, folder / "scatter.png")
    sheets = [_sheet(config, out, names, folder) for names in config.compositions]
    missing = len(config.cells()) - len(rows)
    parts = [
        f"# {config.name}\n",
        f"{len(config.compositions)} compositions, {len(config.prompts)} prompts, {len(config.seeds)} seeds, "
        f"{config.steps} steps, guidance {config.guidance_scale:g}, scale {config.scale:g}, base {config.base}, "
        f"CLIP {config.clip}. {len(good)} pictures measured, {len(rows) - len(good)} failed, {missing} missing.\n",
        "## Methods\n",
        "Means over pictures that were measured.\n",
        _method_table(config, good, measures),
        _difference_tables(config, good, measures),
        "## Wins\n",
        "In how many compositions a method has the best mean; ties share.\n",
        _wins_table(config, good, measures),
        "## Cost of a picture\n",
        _cost_table(config, good),
        _correlation_table(good, measures),
        "## Compositions\n",
        _composition_table(config, good, measures),
        "![text against image alignment](scatter.png)\n",
        *(f"![{sheet.stem}]({sheet.name})\n" for sheet in sheets if sheet is not None),
        _failures(rows),
    ]
    with atomic_path(folder / "report.md") as temporary:
        temporary.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    return folder / "report.md"


def _flat(row: Row) -> Row:
    by_concept = row.get("image alignment by concept", {})
    plain = {key: value for key, value in row.items() if key != "image alignment by concept"}
    return plain | {f"image alignment: {name}": value for name, value in by_concept.items()}


def _labels(config: BenchmarkConfig) -> list[str]:
    return [method.label for method in config.methods]


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None


def _of(rows: Sequence[Row], method: str, composition: str | None = None) -> list[Row]:
    return [r for r in rows if r["method"] == method and composition in (None, r["composition"])]


def _by_method(config: BenchmarkConfig, rows: Sequence[Row], measures: Sequence[str]) -> list[Row]:
    names = [*measures, "UNet evaluations", "seconds", "memory (MiB)"]
    return [
        {"method": label, "pictures": len(_of(rows, label))} | {name: _mean(_of(rows, label), name) for name in names}
        for label in _labels(config)
    ]


def _method_table(config: BenchmarkConfig, rows: Sequence[Row], measures: Sequence[str]) -> str:
    lines = [
        [label, str(len(_of(rows, label))), *(number(_mean(_of(rows, label), name)) for name in measures)]
        for label in _labels(config)
    ]
    return markdown_table(["method", "pictures", *measures], lines)


def _difference_tables(config: BenchmarkConfig, rows: Sequence[Row], measures: Sequence[str]) -> str:
    """Each method minus the reference, with paired bootstrap intervals."""
    labels = _labels(config)
    reference = "mole" if "mole" in labels else labels[0]
    keyed = {label: {(r["composition"], r["prompt"], r["seed"]): r for r in _of(rows, label)} for label in labels}
    others = [label for label in labels if label != reference and keyed[label].keys() & keyed[reference].keys()]
    if not others:
        return ""
    lines = []
    for label in others:
        cells = []
        for name in measures:
            ours, theirs = (
                {key: row[name] for key, row in keyed[m].items() if name in row} for m in (label, reference)
            )
            mean, low, high = paired_bootstrap(ours, theirs)
            cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append([label, *cells])
    head = f"## Difference to {reference}\n\nPaired by composition, prompt and seed; 95 % bootstrap intervals.\n\n"
    return head + markdown_table(["method", *measures], lines)


def _composition_means(config: BenchmarkConfig, rows: Sequence[Row], name: str) -> dict[str, dict[str, float]]:
    means: dict[str, dict[str, float]] = {}
    for names in config.compositions:
        composition = "+".join(names)
        for label in _labels(config):
            mean = _mean(_of(rows, label, composition), name)
            if mean is not None:
                means.setdefault(composition, {})[label] = mean
    return means


def _wins_table(config: BenchmarkConfig, rows: Sequence[Row], measures: Sequence[str]) -> str:
    points = {
        name: wins(_composition_means(config, rows, name), higher_is_better=HIGHER_IS_BETTER[name]) for name in measures
    }
    lines = [[label, *(f"{points[name].get(label, 0):g}" for name in measures)] for label in _labels(config)]
    return markdown_table(["method", *measures], lines)


def _cost_table(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    lines = []
    for label in _labels(config):
        mine = _of(rows, label)
        memory = max((row["memory (MiB)"] for row in mine if row["memory (MiB)"] is not None), default=None)
        evaluations, seconds = _mean(mine, "UNet evaluations"), _mean(mine, "seconds")
        lines.append([label, number(evaluations, 0), number(seconds, 2), number(memory, 0)])
    header = ["method", "UNet evaluations", "seconds", "peak GPU memory (MiB)"]
    return markdown_table(header, lines)


def _correlation_table(rows: Sequence[Row], measures: Sequence[str]) -> str:
    """How far the alignments can be trusted, where the truth is known."""
    truths = [name for name in TRUTHS if name in measures]
    if not truths:
        return ""
    alignments = [name for name in measures if "alignment" in name]
    lines = [
        [name, *(number(correlation([r[name] for r in rows], [r[truth] for r in rows]), 2) for truth in truths)]
        for name in alignments
    ]
    head = "## Alignment against the truth\n\nPearson's r over pictures.\n\n"
    return head + markdown_table(["", *truths], lines)


def _composition_table(config: BenchmarkConfig, rows: Sequence[Row], measures: Sequence[str]) -> str:
    lines = []
    for names in config.compositions:
        for label in _labels(config):
            mine = _of(rows, label, "+".join(names))
            lines.append(["+".join(names), label, *(number(_mean(mine, name)) for name in measures)])
    return markdown_table(["composition", "method", *measures], lines)


def _failures(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if "error" in row]
    if not failed:
        return ""
    lines = [[r["composition"], r["method"], str(r["prompt"]), str(r["seed"]), r["error"]] for r in failed]
    return "## Failed\n\n" + markdown_table(["composition", "method", "prompt", "seed", "error"], lines)


def _scatter(config: BenchmarkConfig, rows: Sequence[Row], path: Path) -> None:
    """Text against image alignment: a small dot for each composition, a large one for a method's mean."""
    # The object-oriented half of matplotlib: pyplot would choose a window system and keep figures alive.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 5), layout="constrained")
    axes = figure.subplots()
    by_text, by_image = (_composition_means(config, rows, name) for name in (TEXT, IMAGE))
    for index, label in enumerate(_labels(config)):
        points = [(by_text[c][label], by_image[c][label]) for c in by_text if label in by_text[c]]
        if points:
            x, y = zip(*points, strict=True)
            colour = f"C{index}"
            axes.scatter(x, y, s=14, color=colour, alpha=0.5)
            axes.scatter([sum(x) / len(x)], [sum(y) / len(y)], s=90, color=colour, edgecolors="black", label=label)
    axes.set_xlabel(TEXT)
    axes.set_ylabel(IMAGE)
    axes.set_title(config.name)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _sheet(config: BenchmarkConfig, out: str | os.PathLike[str], names: Sequence[str], folder: Path) -> Path | None:
    """Methods down, prompts and seeds across; `None` where no picture is there."""
    composition = "+".join(names)
    # A prompt each first, then the next seed, so that few columns show much.
    columns = [(prompt, seed) for seed in config.seeds for prompt in range(len(config.prompts))][:COLUMNS_OF_A_SHEET]
    rows = []
    for method in config.methods:
        paths = [picture_path(out, Cell(composition, method, tuple(names), prompt, seed)) for prompt, seed in columns]
        rows.append((method.label, [read_picture(path) for path in paths if path.is_file()]))
    if not any(pictures for _, pictures in rows):
        return None
    captions = [f"prompt {prompt}, seed {seed}" for prompt, seed in columns]
    return picture_sheet(rows, folder / f"{composition}.png", title=composition, columns=captions)
