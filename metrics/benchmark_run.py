"""Running a benchmark: pictures and rows as they come, resumed where it stopped, shared by several processes.

Each row is a file of its own, written in one step after its picture. A row that is there is done; so a process may
die at any time and lose no more than the pictures it was drawing, and no process waits for another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_path, write_json
from .benchmark_config import BenchmarkConfig, Cell
from .benchmark_draw import Drawer
from .benchmark_judge import Judge
from .benchmark_share import process_share, share

CONFIG, PICTURES, ROWS = "benchmark.json", "pictures", "rows"
_BY_NAME = ("methods", "LoRA files")
"""What rows are named after, so that a folder may hold more of them than one benchmark asks for."""
_NO_MATTER = ("name", "compositions", "concepts", "keep", "reference", "paper")
"""What rows do not depend on, or are named after: the concepts' LoRA files and words stand in for these."""


def run_benchmark(
    config: BenchmarkConfig, out: str | os.PathLike[str], *, device: torch.device | str = "cpu", progress: bool = False
) -> int:
    """Draws and measures what is missing of a benchmark.

    Args:
        config: What to compare.
        out: Folder for pictures and rows. Rows that failed before are tried again.
        device: Where to compute.
        progress: Whether to show a bar.

    Returns:
        How many rows of this process's share have failed; each says why.

    Raises:
        ValueError: The folder holds another benchmark, or base, CLIP or references cannot be read.
    """
    folder = Path(out)
    _claim(folder, config)
    mine = [batch for batch in share(config, *process_share()) if not all(_done(folder, cell) for cell in batch)]
    if not mine:
        return 0
    judge = Judge(config, device)
    drawer = Drawer(config, folder, device, clip=judge.clip, references=judge.pictures)
    failed = 0
    with _bar(sum(len(batch) for batch in mine), progress) as bar:
        for _, batches in groupby(mine, key=lambda batch: (batch[0].composition, batch[0].method.label)):
            group = list(batches)
            unready = _prepare(drawer, group[0][0], bar)
            for batch in group:
                failed += _run_batch(config, folder, batch, drawer, judge, unready)
                bar.update(len(batch))
    return failed


def read_rows(config: BenchmarkConfig, out: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows that are there, in the order of the benchmark."""
    paths = [_row_path(Path(out), cell) for cell in config.cells()]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def picture_path(out: str | os.PathLike[str], cell: Cell) -> Path:
    """Where the picture of a cell lies."""
    return (Path(out) / PICTURES / cell.path).with_suffix(".png")


def _row_path(folder: Path, cell: Cell) -> Path:
    return (folder / ROWS / cell.path).with_suffix(".json")


def _done(folder: Path, cell: Cell) -> bool:
    path = _row_path(folder, cell)
    return path.is_file() and "error" not in json.loads(path.read_text(encoding="utf-8"))


def _claim(folder: Path, config: BenchmarkConfig) -> None:
    """Writes into the folder what its rows depend on, or raises ValueError where they depend on something else."""
    path, mine = folder / CONFIG, json.loads(json.dumps(_what_matters(config)))
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for key, value in mine.items():
        known = before.get(key, value)
        if key in _BY_NAME:
            changed = next((name for name in value if known.get(name, value[name]) != value[name]), None)
            known, value = (known, known | value) if changed is None else (known[changed], value[changed])
            mine[key] = value
        else:
            changed = None if known == value else key
        if changed is not None:
            raise ValueError(
                f"{folder} holds a benchmark with another {key!r}: {known!r} and not {value!r}. "
                "Rows of both would not compare; choose another folder."
            )
    if mine != before:
        write_json(path, mine)


def _what_matters(config: BenchmarkConfig) -> dict[str, Any]:
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NO_MATTER}
    used = dict.fromkeys(name for names in config.compositions for name in names)
    files = {name: dataclasses.asdict(config.concepts[name]) | {"sha256": _sha256(config, name)} for name in used}
    return settings | {
        "methods": {method.label: dataclasses.asdict(method) for method in config.methods},
        "LoRA files": files,
    }


def _sha256(config: BenchmarkConfig, name: str) -> str:
    path = Path(config.concepts[name].lora)
    if not path.is_file():
        raise ValueError(f"concept {name!r}: there is no LoRA file {path}.")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prepare(drawer: Drawer, cell: Cell, bar: Any) -> Exception | None:
    """Gets ready for the pictures of a composition and method; what went wrong is for their rows to say."""

    def show(step: int, numbers: Mapping[str, float]) -> None:
        bar.set_postfix_str(f"gates {cell.method.label} {cell.composition}: step {step}")

    try:
        drawer.prepare(cell.composition, cell.method, show)
    except Exception as error:
        return error
    finally:
        bar.set_postfix_str("")
    return None


def _run_batch(
    config: BenchmarkConfig, folder: Path, batch: list[Cell], drawer: Drawer, judge: Judge, unready: Exception | None
) -> int:
    """How many rows failed. Whatever goes wrong with a batch is written into its rows, and the others go on.

    A batch of which some rows are there is drawn as a whole again, so that pictures do not depend on what was there.
    """
    missing = [index for index, cell in enumerate(batch) if not _done(folder, cell)]
    try:
        if unready is not None:
            raise unready
        drawn = drawer.draw(batch)
        measured = judge.measure([picture for picture, _ in drawn], batch)
        for index in missing:
            with atomic_path(picture_path(folder, batch[index])) as temporary:
                drawn[index][0].save(temporary)
        results = [numbers | cost for numbers, (_, cost) in zip(measured, drawn, strict=True)]
    except Exception as error:
        results = [{"error": f"{type(error).__name__}: {error}"}] * len(batch)
    for index in missing:
        cell = batch[index]
        row = {
            "composition": cell.composition,
            "method": cell.method.label,
            "kept": "+".join(cell.kept),
            "prompt": cell.prompt,
            "seed": cell.seed,
        }
        write_json(_row_path(folder, cell), row | results[index])
    return sum("error" in results[index] for index in missing)


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Any]:
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="pictures", disable=not progress) as bar:
        yield bar
