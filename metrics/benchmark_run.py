"""Running a benchmark: pictures and rows as they come, resumed where it stopped, shared by several processes.

Each row is a file of its own, written in one step after its picture. A row that is there is done; so a process may
die at any time and lose no more than the picture it was drawing, and no process waits for another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..files import atomic_path, write_json
from ..pipelines import MoLEStableDiffusionPipeline
from .alignment import image_alignment, text_alignment, text_name
from .benchmark_config import BenchmarkConfig, Cell
from .encoders import ImageEncoder, TextCache, VisionBackbone, embed_images, load_clip
from .pictures import picture_files, read_picture
from .presence import concept_presence
from .region import region_alignment

CONFIG, PICTURES, ROWS = "benchmark.json", "pictures", "rows"


def process_share() -> tuple[int, int]:
    """Index and number of processes, as `accelerate launch` and `torchrun` tell them; (0, 1) alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


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
    rank, processes = process_share()
    # Shared out before looking at what is done, so that processes that look at different times agree.
    mine = [cell for cell in config.cells()[rank::processes] if not _done(folder, cell)]
    if not mine:
        return 0
    drawer, judge = _Drawer(config, device), _Judge(config, device)
    failed = 0
    with _bar(len(mine), progress) as bar:
        for _, cells in groupby(mine, key=lambda cell: cell.composition):
            drawer.forget()
            for cell in cells:
                failed += _run_cell(config, folder, cell, drawer, judge)
                bar.update()
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
    """Writes the configuration, with the LoRAs' hashes, into the folder; ValueError where another one lies there."""
    used = dict.fromkeys(name for names in config.compositions for name in names)
    files = {name: _sha256(config, name) for name in used}
    path, plain = folder / CONFIG, json.loads(json.dumps(dataclasses.asdict(config) | {"LoRA files": files}))
    if not path.is_file():
        write_json(path, plain)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key in plain if before.get(key) != plain[key]]
    if changed:
        raise ValueError(
            f"{folder} holds a benchmark with another {changed[0]!r}: {before.get(changed[0])!r} and not "
            f"{plain[changed[0]]!r}. Rows of both would not compare; choose another folder."
        )


def _sha256(config: BenchmarkConfig, name: str) -> str:
    path = Path(config.concepts[name].lora)
    if not path.is_file():
        raise ValueError(f"concept {name!r}: there is no LoRA file {path}.")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run_cell(config: BenchmarkConfig, folder: Path, cell: Cell, drawer: _Drawer, judge: _Judge) -> bool:
    """Whether it failed. Whatever goes wrong with one row is written there, and the others go on."""
    row: dict[str, Any] = {
        "composition": cell.composition,
        "method": cell.method.label,
        "prompt": cell.prompt,
        "seed": cell.seed,
    }
    try:
        picture, cost = drawer.draw(cell)
        with atomic_path(picture_path(folder, cell)) as temporary:
            picture.save(temporary)
        row |= judge.measure(picture, cell) | cost
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    write_json(_row_path(folder, cell), row)
    return "error" in row


class _Drawer:
    """One pipeline, with the LoRAs and gates of one composition at a time."""

    def __init__(self, config: BenchmarkConfig, device: torch.device | str) -> None:
        self._config = config
        self._device = torch.device(device)
        self._pipe = MoLEStableDiffusionPipeline.from_pretrained(_base(config.base)).to(self._device)
        self._pipe.set_progress_bar_config(disable=True)
        self._composition: str | None = None
        self._evaluations = 0
        self._pipe.unet.register_forward_hook(self._count)

    def forget(self) -> None:
        """Takes the LoRAs off."""
        self._composition = None
        self._pipe.unload_loras()

    def draw(self, cell: Cell) -> tuple[Image.Image, dict[str, Any]]:
        """The picture, and what it cost: UNet evaluations, seconds, and MiB of GPU memory at its peak."""
        names, pipe = cell.composition.split("+"), self._pipe
        self._load(cell.composition)
        if cell.method.build().needs_gates and pipe.gates is None:
            pipe.load_gates(self._gates(cell.composition))
        pipe.set_composition(cell.method.build())
        self._evaluations = 0
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        picture = pipe(
            self._config.prompt(cell.prompt, names),
            loras=dict.fromkeys(names, self._config.scale),
            num_inference_steps=self._config.steps,
            guidance_scale=self._config.guidance_scale,
            generator=torch.Generator().manual_seed(cell.seed),
        ).images[0]
        memory = torch.cuda.max_memory_allocated(self._device) / 2**20 if cuda else None
        cost = {"UNet evaluations": self._evaluations, "seconds": time.perf_counter() - start, "memory (MiB)": memory}
        return picture, cost

    def _load(self, composition: str) -> None:
        if self._composition == composition:
            return
        names = composition.split("+")
        self._pipe.load_loras({name: self._config.concepts[name].lora for name in names})
        self._composition = composition

    def _gates(self, composition: str) -> Path:
        if self._config.gates == "toybox":
            from .. import toybox

            return toybox.gates_dir(composition)
        return Path(str(self._config.gates)) / composition

    def _count(self, unet: nn.Module, args: Any, output: Any) -> None:
        experts = self._pipe.experts
        run = None if experts is None else experts.context
        self._evaluations += 1 if run is None else run.passes


class _Judge:
    """Measures pictures; every prompt and reference is embedded once."""

    def __init__(self, config: BenchmarkConfig, device: torch.device | str) -> None:
        self._config = config
        self._clip = load_clip(config.clip).to(device)
        self._encoder: ImageEncoder = self._clip
        if config.image_encoder is not None:
            self._encoder = VisionBackbone.from_pretrained(config.image_encoder).to(device)
        self._texts = TextCache(self._clip)
        used = dict.fromkeys(name for names in config.compositions for name in names)
        self._references = {name: embed_images(self._encoder, self._pictures(name)) for name in used}
        self._oracle: Any = None
        if all(config.concepts[name].references == "toybox" for name in used):
            from ..toybox.oracle import Oracle

            self._oracle = Oracle()

    def measure(self, picture: Image.Image, cell: Cell) -> dict[str, Any]:
        """All numbers of one picture."""
        names = cell.composition.split("+")
        features = embed_images(self._clip, [picture])
        text = self._texts.embed([self._config.prompt(cell.prompt, names, described=True)])
        row: dict[str, Any] = {
            text_name(scale): text_alignment(features, text, scale).item() for scale in ("cosine", "clipscore")
        }
        seen = features if self._encoder is self._clip else embed_images(self._encoder, [picture])
        aligned = {name: image_alignment(seen, self._references[name]).item() for name in names}
        row |= {"image alignment": _mean(list(aligned.values())), "image alignment by concept": aligned}
        return row if self._oracle is None else row | self._look(picture, names)

    def _look(self, picture: Image.Image, names: Sequence[str]) -> dict[str, Any]:
        from ..toybox.oracle import judge

        detections = self._oracle.detect([picture])[0]
        boxes = {name: finding.box for name, finding in judge(detections, names).items()}
        regions = {
            name: region_alignment(self._encoder, picture, boxes[name], self._references[name]) for name in names
        }
        return {
            **concept_presence(detections, names),
            "region alignment": _mean([score for score, _ in regions.values()]),
            "detection rate": _mean([float(found) for _, found in regions.values()]),
        }

    def _pictures(self, name: str) -> list[Image.Image]:
        folder = self._config.concepts[name].references
        if folder == "toybox":
            from .. import toybox

            return toybox.references(name)
        try:
            return [read_picture(file) for file in picture_files(folder)]
        except ValueError as error:
            raise ValueError(f"references of concept {name!r}: {error}") from None


def _base(base: str) -> str:
    if base == "toybox":
        from .. import toybox

        return str(toybox.base_dir())
    return base


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Any]:
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="pictures", disable=not progress) as bar:
        yield bar
