"""Measuring the pictures of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from mole_diffusion.benchmark.cell import Cell
from mole_diffusion.benchmark.config import BenchmarkConfig
from mole_diffusion.benchmark.measures import (
    ALL_PRESENT,
    CONFUSION,
    COUNT_ERROR,
    DETECTION,
    IMAGE,
    OMISSION,
    PRESENCE,
    REGION,
    TEXT,
    TEXT_COSINE,
)
from mole_diffusion.errors import MoLEError
from mole_diffusion.metrics.alignment import ImageAlignment, TextAlignment, on_scale
from mole_diffusion.metrics.encoders import ImageEncoder, VisionBackbone, load_clip
from mole_diffusion.metrics.features import SharedEncoder
from mole_diffusion.metrics.presence import ConceptPresence
from mole_diffusion.metrics.region import RegionAlignment, oracle_detector
from mole_diffusion.pictures import read_pictures
from mole_diffusion.toybox.oracle import Oracle

TRUTHS = (PRESENCE, ALL_PRESENT, OMISSION, CONFUSION, COUNT_ERROR)  # headed as `concept_presence` names them


class Scores(NamedTuple):
    """What was measured of one picture.

    Attributes:
        numbers: What was measured, by `Measure.key`; the toybox's truths only for pictures of the toybox.
        image_by_concept: Image alignment with each concept.
    """

    numbers: dict[str, float]
    image_by_concept: dict[str, float]


class Judge:
    """Measures pictures with the metrics; every prompt, reference and picture is embedded once."""

    def __init__(self, config: BenchmarkConfig, device: torch.device | str) -> None:
        self._config = config
        self.clip = load_clip(config.clip).to(device)
        shared: Any = SharedEncoder(self.clip)
        encoder: ImageEncoder = shared
        if config.image_encoder is not None:
            encoder = VisionBackbone.from_pretrained(config.image_encoder).to(device)
        self._names = list(dict.fromkeys(name for names in config.compositions for name in names))
        references = {name: self.pictures(name) for name in self._names}
        self._text = TextAlignment(shared)
        self._image = ImageAlignment(encoder, references)
        self._presence: ConceptPresence | None = None
        if all(config.concepts[name].references == "toybox" for name in self._names):
            # Only of the toybox's subjects does an oracle know the truth.
            oracle = Oracle()
            self._presence = ConceptPresence(oracle)
            self._region = RegionAlignment(encoder, references, oracle_detector(oracle))

    def measure(self, pictures: Sequence[Image.Image], cells: Sequence[Cell]) -> list[Scores]:
        """All numbers of pictures that were drawn together, as to the concepts that were kept."""
        names = cells[0].kept
        columns = [self._names.index(name) for name in names]
        asked = [names] * len(pictures)
        described = [self._config.prompt(cell.prompt, names, described=True) for cell in cells]
        cosine = self._text.measure(pictures, described)[:, 0]
        aligned = self._image.measure(pictures, asked)[:, columns]
        numbers = {
            TEXT: on_scale(cosine, "clipscore"),
            TEXT_COSINE: cosine,
            IMAGE: aligned.mean(dim=1),
        }
        if self._presence is not None:
            truth = self._presence.measure(pictures, asked)
            numbers |= {measure: truth[:, self._presence.names.index(measure.heading)] for measure in TRUTHS}
            regions, found = self._region.measure(pictures, asked).chunk(2, dim=1)
            numbers |= {REGION: regions[:, columns].mean(dim=1), DETECTION: found[:, columns].mean(dim=1)}
        return [
            Scores(
                {measure.key: float(values[row]) for measure, values in numbers.items()},
                dict(zip(names, aligned[row].tolist(), strict=True)),
            )
            for row in range(len(pictures))
        ]

    def pictures(self, name: str) -> list[Image.Image]:
        """The reference pictures of a concept."""
        folder = self._config.concepts[name].references
        if folder == "toybox":
            from mole_diffusion import toybox

            return toybox.references(name)
        try:
            return read_pictures(folder)
        except MoLEError as error:
            raise MoLEError(f"references of concept {name!r}: {error}") from None
