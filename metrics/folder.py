"""Alignment of a folder of pictures, wherever they come from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import MoLEError
from ..pictures import picture_files, read_picture, read_pictures
from ..progress import progress_bar
from ..prompts import read_prompts
from .alignment import SCALES, ImageAlignment, TextAlignment, on_scale, text_name
from .encoders import ImageEncoder, TextImageEncoder
from .features import SharedEncoder


@dataclass
class Evaluation:
    """What `evaluate_folder` measured.

    Attributes:
        rows: One for each picture that could be read: "picture", "prompt" and its numbers.
        failures: Name of a picture that could not be read to the reason.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def means(self) -> dict[str, float]:
        """Mean of each number over the rows."""
        names = [name for name in self.rows[0] if name not in ("picture", "prompt")]
        return {name: sum(row[name] for row in self.rows) / len(self.rows) for name in names}


def evaluate_folder(
    images: str | os.PathLike[str],
    prompts: str | os.PathLike[str],
    references: Mapping[str, str | os.PathLike[str]],
    clip: TextImageEncoder,
    *,
    image_encoder: ImageEncoder | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> Evaluation:
    """Measures every picture of a folder against its prompt and against the pictures of each concept.

    Args:
        images: The folder.
        prompts: A text file with a prompt a line, in the natural order of the pictures' names (2.png before
            10.png), or one line for all; or a JSON
            file of picture names to prompts.
        references: Concept to the folder with its pictures.
        clip: Measures text alignment.
        image_encoder: Measures image alignment; `None`: `clip`.
        batch_size: Pictures at a time.
        progress: Whether to show a bar.

    Returns:
        The numbers of every picture that can be read, and why the others cannot.

    Raises:
        MoLEError: There are no pictures, not as many prompts, a concept without pictures, a broken reference, or not
            one readable picture. Nothing is measured then.
    """
    by_file, known = read_inputs(images, prompts, references)
    files = list(by_file)
    shared: Any = SharedEncoder(clip)
    text, image = TextAlignment(shared, batch_size=batch_size), None
    if references:
        image = ImageAlignment(image_encoder or shared, known, batch_size=batch_size)
        for name in known:  # a reference that cannot be measured is said before the pictures are
            image.reference_features(name)
    result = Evaluation()
    with progress_bar("pictures", len(files), enabled=progress) as bar:
        for start in range(0, len(files), batch_size):
            pictures: dict[Path, Image.Image] = {}
            for file in files[start : start + batch_size]:
                try:
                    pictures[file] = read_picture(file)
                except MoLEError as error:
                    result.failures[file.name] = str(error)
            if pictures:
                result.rows += _rows(pictures, by_file, text, image)
            bar.advance(len(files[start : start + batch_size]))
    if not result.rows:
        raise MoLEError(f"not one picture of {images} could be read. The first: {next(iter(result.failures.values()))}")
    return result


def read_inputs(
    images: str | os.PathLike[str], prompts: str | os.PathLike[str], references: Mapping[str, str | os.PathLike[str]]
) -> tuple[dict[Path, str], dict[str, list[Image.Image]]]:
    """What `evaluate_folder` reads before it measures, of which mistakes can be told before a CLIP is loaded.

    Returns:
        The prompt of every picture's file, and the pictures of every concept.

    Raises:
        MoLEError: There are no pictures, not as many prompts, or a concept without pictures.
    """
    files = picture_files(images)
    by_file = dict(zip(files, read_prompts(prompts, [file.name for file in files]), strict=True))
    return by_file, {name: _read_references(name, folder) for name, folder in references.items()}


def _rows(
    pictures: Mapping[Path, Image.Image],
    prompts: Mapping[Path, str],
    text: TextAlignment,
    image: ImageAlignment | None,
) -> list[dict[str, Any]]:
    """What the metrics say of each picture."""
    shown = list(pictures.values())
    cosine = text.measure(shown, [prompts[file] for file in pictures])[:, 0]
    columns = {text_name(scale): on_scale(cosine, scale) for scale in SCALES}
    if image is not None:
        aligned = image.measure(shown)
        columns |= {f"image alignment: {name}": aligned[:, k] for k, name in enumerate(image.names)}
        columns["image alignment: mean"] = aligned.mean(dim=1)
    numbers = [{name: float(values[row]) for name, values in columns.items()} for row in range(len(shown))]
    return [{"picture": file.name, "prompt": prompts[file], **row} for file, row in zip(pictures, numbers, strict=True)]


def _read_references(concept: str, folder: str | os.PathLike[str]) -> list[Image.Image]:
    try:
        return read_pictures(folder)
    except MoLEError as error:
        raise MoLEError(f"references of concept {concept!r}: {error}") from None
