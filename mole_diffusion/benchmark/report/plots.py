"""The pictures of a benchmark's report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from mole_diffusion.benchmark.cell import Cell
from mole_diffusion.benchmark.config import BenchmarkConfig
from mole_diffusion.benchmark.measures import IMAGE, TEXT
from mole_diffusion.benchmark.report.groups import means_by_loras, of_method
from mole_diffusion.benchmark.row import Row
from mole_diffusion.benchmark.run import picture_path
from mole_diffusion.errors import MoLEError
from mole_diffusion.families.stable_diffusion import StableDiffusion
from mole_diffusion.files import atomic_path
from mole_diffusion.gating.scopes import gate_name
from mole_diffusion.pictures import read_picture
from mole_diffusion.sheets import as_they_are, gate_heat_map, picture_sheet

MOST_COLUMNS = 6  # on a sheet
MOST_PLACES = 40  # on a heat map that can still be read


def draw_scatter(config: BenchmarkConfig, rows: Sequence[Row], path: Path) -> None:
    """Text against image alignment: a small dot for each composition, a large one for a method's mean."""
    # The object-oriented half of matplotlib: pyplot would choose a window system and keep figures alive.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    by_text, by_image = (means_by_loras(config, rows, measure) for measure in (TEXT, IMAGE))
    for index, label in enumerate(config.labels):
        points = [(by_text[c][label], by_image[c][label]) for c in by_text if label in by_text[c]]
        if points:
            x, y = zip(*points, strict=True)
            colour, shape = mark(index)
            axes.scatter(x, y, s=14, color=colour, marker=shape, alpha=0.5)
            mean = [sum(x) / len(x)], [sum(y) / len(y)]
            axes.scatter(*mean, s=90, color=colour, marker=shape, edgecolors="black", label=label)
    axes.set_xlabel(TEXT.heading)
    axes.set_ylabel(IMAGE.heading)
    axes.set_title(config.name)
    figure.legend(loc="outside right upper")
    as_they_are(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)


def mark(index: int) -> tuple[str, str]:
    """Colour and shape of a method's dots, another pair for each of the first sixty."""
    return f"C{index % 10}", "os^DvP"[index // 10 % 6]


def draw_sheet(config: BenchmarkConfig, out: str | os.PathLike[str], names: Sequence[str], path: Path) -> bool:
    """Methods down, prompts and seeds across; or kept LoRAs across where there are several choices of them.

    Returns:
        Whether there was a picture to show.
    """
    composition, choices = "+".join(names), config.kept(names)
    # A prompt each first, then the next seed, so that few columns show much.
    draws = [(prompt, seed) for seed in config.seeds for prompt in range(len(config.prompts))]
    draws = draws[: MOST_COLUMNS if len(choices) == 1 else 1]
    columns = [(kept, prompt, seed) for kept in choices for prompt, seed in draws]
    rows = []
    for method in config.methods:
        paths = [picture_path(out, Cell(composition, method, *column)) for column in columns]
        rows.append((method.label, [picture for path in paths if (picture := _whole(path)) is not None]))
    if not any(pictures for _, pictures in rows):
        return False
    if len(choices) == 1:
        captions = [f"prompt {prompt}, seed {seed}" for prompt, seed in draws]
    else:
        captions = ["all" if len(kept) == len(names) else "+".join(kept) for kept in choices]
    picture_sheet(rows, path, title=composition, columns=captions)
    return True


def _whole(path: Path) -> Image.Image | None:
    """A picture; None where it is missing or damaged, which a run does again."""
    try:
        return read_picture(path)
    except MoLEError:
        return None


def draw_gates(rows: Sequence[Row], method: str, composition: str, path: Path) -> bool:
    """The weights that the gates gave, mean over steps and pictures. Returns whether there are any."""
    mine = [r for r in of_method(rows, method) if r.composition == composition and r.is_whole and r.gates]
    if not mine:
        return False
    places = list(mine[0].gates)
    numbers = [[[float("nan") if v is None else v for v in row.gates[place]] for place in places] for row in mine]
    means = torch.tensor(numbers, dtype=torch.float64).mean(dim=0)
    if len(places) > MOST_PLACES:
        places, means = _by_block(places, means)
    gate_heat_map(means, places, composition.split("+"), path, title=f"{method}: gates, mean over steps and pictures")
    return True


def _by_block(places: Sequence[str], means: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """The mean over all places of a block, as far as a LoRA touches them."""
    blocks = [_block(place) for place in places]
    names = list(dict.fromkeys(blocks))
    rows = [means[[block == name for block in blocks]].nanmean(dim=0) for name in names]
    return [f"{name} (mean of {blocks.count(name)})" for name in names], torch.stack(rows)


def _block(place: str) -> str:
    """The gate's place in scope "block": "unet.mid_block.attentions.0.transformer_blocks.0"."""
    component, _, module = place.partition(".")
    return gate_name("block", component, module, StableDiffusion.architectures[component])
