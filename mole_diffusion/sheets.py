"""Pictures about pictures and trainings: a labelled grid of images, heat maps of gate weights, curves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from mole_diffusion.errors import MoLEError
from mole_diffusion.extras import needs

from .files import atomic_path
from .pictures import refuse_ending

if TYPE_CHECKING:
    from torch import Tensor

PLOTS = "drawing weights and curves"  # what needs matplotlib
INK, PAPER, GAP = (28, 28, 32), (255, 255, 255), 6


def picture_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    columns: Sequence[str] = (),
    cell: int = 160,
) -> Path:
    """Writes a grid of pictures, one labelled row after another.

    Args:
        rows: Label and pictures of each row; rows may differ in length. A label may have several lines.
        path: The file to write; its suffix chooses the format.
        title: A line above everything.
        columns: Captions above the columns.
        cell: Side of a picture on the sheet, in pixels. Smaller pictures are enlarged by a whole factor where one
            fits (64 to 128 or 192), so that every pixel stays visible; larger ones are reduced.

    Raises:
        MoLEError: There is no picture to show, or pictures cannot be written under such a name.
    """
    refuse_ending(path)
    if not any(pictures for _, pictures in rows):
        raise MoLEError("there is no picture to put on the sheet: every row is empty.")
    font, bold = ImageFont.load_default(16), ImageFont.load_default(20)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = max(int(pen.multiline_textbbox((0, 0), label, font=font)[2]) for label, _ in rows) + 3 * GAP
    head = (40 if title else GAP) + (26 if columns else 0)
    width = left + max(len(pictures) for _, pictures in rows) * (cell + GAP) + GAP
    title_width = int(pen.textbbox((0, 0), title, font=bold)[2]) + 4 * GAP
    sheet = Image.new("RGB", (max(width, title_width), head + len(rows) * (cell + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((2 * GAP, 2 * GAP), title, fill=INK, font=bold)
    for index, caption in enumerate(columns):
        middle = left + index * (cell + GAP) + cell // 2
        pen.text((middle, head - GAP), caption, fill=INK, font=font, anchor="ms")
    for row, (label, pictures) in enumerate(rows):
        top = head + row * (cell + GAP)
        pen.multiline_text((2 * GAP, top + cell // 2), label, fill=INK, font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            fitted = _fit(picture, cell)
            corner = left + column * (cell + GAP) + (cell - fitted.width) // 2, top + (cell - fitted.height) // 2
            sheet.paste(fitted, corner)
    with atomic_path(path) as temporary:
        sheet.save(temporary)
    return Path(path)


def gate_heat_map(
    weights: Tensor, places: Sequence[str], loras: Sequence[str], path: str | os.PathLike[str], *, title: str = ""
) -> Path:
    """Draws gate weights as a heat map, places down and LoRAs across, with the number in each cell.

    Args:
        weights: `(places, num_experts)`; NaN where a LoRA has nothing at a place, shown as an empty cell.
        places: Names of the rows, from the model's input to its output.
        loras: Names of the columns.
        path: The file to write; its suffix chooses the format.

    Raises:
        MoLEError: The names do not fit the shape of `weights`.
    """
    return gate_heat_maps({title: weights}, places, loras, path)


def gate_heat_maps(
    tables: Mapping[str, Tensor], places: Sequence[str], loras: Sequence[str], path: str | os.PathLike[str]
) -> Path:
    """Draws several tables of gate weights side by side, on one scale.

    Args:
        tables: Title to weights, as in `gate_heat_map`.
        places: Names of the rows.
        loras: Names of the columns.
        path: The file to write; its suffix chooses the format.

    Raises:
        MoLEError: There is no table, or the names do not fit the shape of one.
    """
    # The object-oriented half of matplotlib: pyplot would choose a window system and keep figures alive.
    with needs("train", PLOTS):
        from matplotlib.figure import Figure

    if not tables:
        raise MoLEError("there is no table of gate weights to draw.")
    for weights in tables.values():
        if tuple(weights.shape) != (len(places), len(loras)):
            raise MoLEError(
                f"`weights` must be (places, LoRAs) = ({len(places)}, {len(loras)}), got {tuple(weights.shape)}."
            )
    arrays = {title: weights.detach().float().cpu().numpy() for title, weights in tables.items()}
    largest = max(1.0, *(float(table[table == table].max(initial=0)) for table in arrays.values()))
    size = (3.5 + 1.1 * len(loras) * len(arrays), 1.4 + 0.3 * len(places))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(arrays), sharey=True, squeeze=False)[0]
    for axes, (title, table) in zip(panels, arrays.items(), strict=True):
        image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=largest)
        axes.set_xticks(range(len(loras)), loras)
        axes.set_yticks(range(len(places)), places, fontsize=8)
        axes.xaxis.tick_top()
        for row, values in enumerate(table):
            for column, value in enumerate(values):
                if value == value:  # not NaN
                    colour = "black" if value > 0.6 * largest else "white"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
        if len(arrays) > 1:
            axes.set_title(title, wrap=True)
    if len(arrays) == 1:  # over the names of the rows too, where there is room for it
        figure.suptitle(next(iter(arrays)), wrap=True)
    figure.colorbar(image, ax=list(panels), label="gate weight")
    as_they_are(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return Path(path)


def curves(
    panels: Mapping[str, Mapping[str, Sequence[float]]], path: str | os.PathLike[str], *, title: str = ""
) -> Path:
    """Draws numbers over training steps, one panel above another.

    Args:
        panels: Label of a panel to its curves; name of a curve to one number per step. Each is drawn faintly, and its
            running mean over a twentieth of the steps in full.
        path: The file to write; its suffix chooses the format.
        title: A line above everything.

    Raises:
        MoLEError: There is nothing to draw.
    """
    with needs("train", PLOTS):
        from matplotlib.figure import Figure

    if not any(panels.values()):
        raise MoLEError("there is no curve to draw: every panel is empty.")
    figure = Figure(figsize=(8, 0.6 + 2.2 * len(panels)), layout="constrained")
    for axes, (label, lines) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        for index, (name, values) in enumerate(lines.items()):
            steps, colour = range(1, len(values) + 1), f"C{index}"
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _running_mean(values, max(1, len(values) // 20)), color=colour, label=name)
        axes.set_ylabel(label)
        axes.legend(loc="upper right", fontsize=8)
    axes.set_xlabel("training step")
    figure.suptitle(title)
    as_they_are(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return Path(path)


def as_they_are(figure: Any) -> None:
    """Lets a figure show names as they are: two dollar signs in one begin no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Each entry the mean of the last `width` up to it."""
    windows = [values[max(0, k + 1 - width) : k + 1] for k in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """`picture` as large as fits into a square of side `cell`."""
    picture = picture.convert("RGB")
    longest = max(picture.size)
    if longest * 2 <= cell:
        factor = cell // longest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    scale = cell / longest
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)
