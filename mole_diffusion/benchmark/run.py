"""Running a benchmark: pictures and rows as they come, resumed where it stopped, shared by several processes.

Each row is a file of its own, written in one step after its picture. A row that is there is done; so a process may
die at any time and lose no more than the pictures it was drawing, and no process waits for another.
"""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mole_diffusion.benchmark.cell import Cell
from mole_diffusion.benchmark.config import BenchmarkConfig
from mole_diffusion.benchmark.draw import Cost, Drawer
from mole_diffusion.benchmark.inputs import LORAS, METHODS, SHA256, made_of
from mole_diffusion.benchmark.judge import Judge
from mole_diffusion.benchmark.row import Row, cell_names, read_row, write_row
from mole_diffusion.benchmark.share import process_share, share
from mole_diffusion.errors import MoLEError
from mole_diffusion.files import NotWrittenError, atomic_path, in_use, try_folder, write_json
from mole_diffusion.progress import ProgressBar, progress_bar
from mole_diffusion.reading import regular_text

CONFIG, PICTURES, ROWS = "benchmark.json", "pictures", "rows"
_BY_NAME = (METHODS, LORAS, SHA256)
"""What rows are named after: a folder may hold rows of more methods, LoRAs and files than one benchmark asks for."""
_COMPUTED = "computed with"
_PNG_BEGINS, _PNG_ENDS = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


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
        MoLEError: The folder holds another benchmark or is in use; or base, CLIP or references cannot be read.
        NotWrittenError: The folder cannot be written, or the disk is full.
    """
    folder = try_folder(out)
    rank, processes = process_share()
    with in_use(folder, f"-{rank}" if processes > 1 else ""):
        return _run(config, folder, share(config, rank, processes), device, progress)


def _run(
    config: BenchmarkConfig, folder: Path, batches: list[list[Cell]], device: torch.device | str, progress: bool
) -> int:
    _claim(folder, config, device)
    mine = [batch for batch in batches if not all(_done(folder, cell) for cell in batch)]
    if not mine:
        return 0
    judge = Judge(config, device)
    drawer = Drawer(config, folder, device, clip=judge.clip, references=judge.pictures)
    _claim(folder, config, device)  # a model that was loaded from the Hub is known now
    failed = 0
    with progress_bar("pictures", sum(len(batch) for batch in mine), enabled=progress) as bar:
        for _, same in groupby(mine, key=lambda batch: (batch[0].composition, batch[0].method.label)):
            group = list(same)
            unready = _prepare(drawer, group[0][0], bar)
            for batch in group:
                failed += _run_batch(config, folder, batch, drawer, judge, unready)
                bar.advance(len(batch))
    return failed


def read_rows(config: BenchmarkConfig, out: str | os.PathLike[str]) -> list[Row]:
    """The rows that are there, in the order of the benchmark. One that is damaged says so as its error."""
    rows = []
    for cell in config.cells():
        path = _row_path(Path(out), cell)
        try:
            row = read_row(path, cell)
        except MoLEError as error:
            place = path.relative_to(out).as_posix()
            why = str(error).replace(str(path), place)
            row = Row(**cell_names(cell), error=f"{why} `mole benchmark run` does it again.")
        if row is not None:
            rows.append(row)
    return rows


def picture_path(out: str | os.PathLike[str], cell: Cell) -> Path:
    """Where the picture of a cell lies."""
    return (Path(out) / PICTURES / cell.path).with_suffix(".png")


def _row_path(folder: Path, cell: Cell) -> Path:
    return (folder / ROWS / cell.path).with_suffix(".json")


def _done(folder: Path, cell: Cell) -> bool:
    """Whether a row and its picture are there, whole."""
    try:
        row = read_row(_row_path(folder, cell), cell)
    except MoLEError:
        return False
    return row is not None and row.error is None and _is_whole(picture_path(folder, cell))


def _is_whole(picture: Path) -> bool:
    if not picture.is_file():
        return False
    try:
        with picture.open("rb") as file:
            begins = file.read(len(_PNG_BEGINS))
            file.seek(-len(_PNG_ENDS), os.SEEK_END)
            return begins == _PNG_BEGINS and file.read() == _PNG_ENDS
    except OSError:
        return False


def _claim(folder: Path, config: BenchmarkConfig, device: torch.device | str) -> None:
    """Writes into the folder what its rows depend on, or raises MoLEError where they depend on something else."""
    path, mine = folder / CONFIG, json.loads(json.dumps(made_of(config)))
    before = _read_claim(path)
    for key, value in mine.items():
        known = before.get(key, value)
        if key in _BY_NAME:
            changed = next((name for name in value if not _same(known.get(name), value[name])), None)
            both = {name: _known(known.get(name), entry) for name, entry in {**known, **value}.items()}
            known, value = (known, both) if changed is None else (known[changed], value[changed])
            mine[key] = both
            changed = changed if changed is None or key != SHA256 else f"sha256 of the {changed}"
        else:
            changed = None if known == value else key
        if changed is not None:
            what = key if key != SHA256 else changed
            raise MoLEError(
                f"{folder} holds a benchmark with another {what!r}: {known!r} and not {value!r}. "
                "Rows of both would not compare; choose another folder."
            )
    now = {"threads": torch.get_num_threads(), "device": torch.device(device).type}
    mine[_COMPUTED] = before.get(_COMPUTED, now)
    if mine[_COMPUTED] != now:
        warnings.warn(
            f"{folder} was begun with {mine[_COMPUTED]} and goes on with {now}: rows will differ in their last digits "
            "from those of one run. The same number of threads is set by OMP_NUM_THREADS.",
            stacklevel=1,
        )
    if mine != before:
        write_json(path, mine)


def _read_claim(path: Path) -> dict[str, Any]:
    if not path.exists():
        if any(path.parent.glob(f"{ROWS}/**/*.json")):
            raise MoLEError(
                f"{path} is missing, which says what the rows beside it depend on. Put it back, or choose another "
                "folder."
            )
        return {}
    try:
        before = json.loads(regular_text(path))
    except (ValueError, RecursionError) as error:
        raise MoLEError(
            f"{path} is damaged: {error}. It says what the rows depend on; choose another folder."
        ) from None
    if not isinstance(before, dict) or not all(isinstance(before.get(key), dict) for key in (METHODS, LORAS)):
        raise MoLEError(f"{path} is not of a benchmark, and would be replaced. Choose another folder.")
    if not isinstance(before.get(SHA256, {}), dict):
        raise MoLEError(f"{path} is damaged: {SHA256!r} is no object. Choose another folder.")
    return before


def _same(known: Any, value: Any) -> bool:
    """Whether what was known before is the same, as far as both are known."""
    if isinstance(known, dict) and isinstance(value, dict):
        return all(_same(known.get(key), entry) for key, entry in value.items())
    return known is None or value is None or bool(known == value)


def _known(known: Any, value: Any) -> Any:
    return known if value is None else value


def _prepare(drawer: Drawer, cell: Cell, bar: ProgressBar) -> Exception | None:
    """Prepares the pictures of a composition and method; returns what went wrong, which their rows will say."""

    def show(step: int, numbers: Mapping[str, float]) -> None:
        bar.note(f"gates {cell.method.label} {cell.composition}: step {step}")

    try:
        drawer.prepare(cell.composition, cell.method, show)
    except Exception as error:
        _raise_what_concerns_all(error)
        return error
    finally:
        bar.note("")
    return None


def _run_batch(
    config: BenchmarkConfig, folder: Path, batch: list[Cell], drawer: Drawer, judge: Judge, unready: Exception | None
) -> int:
    """How many rows failed. Whatever goes wrong with a batch is written into its rows, and the others go on.

    A batch of which some rows are there is drawn as a whole again, so that pictures do not depend on what was there.
    """
    missing = [index for index, cell in enumerate(batch) if not _done(folder, cell)]
    drawn: list[tuple[Image.Image, Cost]] = []
    try:
        if unready is not None:
            raise unready
        drawn = drawer.draw(batch)
        measured = judge.measure([picture for picture, _ in drawn], batch)
        results = [
            Row(**cell_names(cell), **scores._asdict(), **cost._asdict())
            for cell, scores, (_, cost) in zip(batch, measured, drawn, strict=True)
        ]
    except Exception as error:
        _raise_what_concerns_all(error)
        drawn, results = [], [Row(**cell_names(cell), error=f"{type(error).__name__}: {error}") for cell in batch]
    for index in missing:
        if drawn:
            with atomic_path(picture_path(folder, batch[index])) as temporary:
                drawn[index][0].save(temporary)
        write_row(_row_path(folder, batch[index]), results[index])
    return sum(results[index].error is not None for index in missing)


def _raise_what_concerns_all(error: Exception) -> None:
    """Raises what would hit every row alike, such as a full disk, instead of writing it into this one."""
    if isinstance(error, NotWrittenError):
        raise error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise NotWrittenError(f"{error}. Free some space, and start again.") from error
