"""Measuring the pictures of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from mole_diffusion.benchmark.config import BenchmarkConfig, Cell
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
from mole_diffusion.metrics.alignment import image_alignment, text_alignment
from mole_diffusion.metrics.encoders import ImageEncoder, TextCache, VisionBackbone, embed_images, load_clip
from mole_diffusion.metrics.presence import concept_presence
from mole_diffusion.metrics.region import oracle_detector, reference_regions, region_alignment
from mole_diffusion.pictures import read_pictures

TRUTHS = (PRESENCE, ALL_PRESENT, OMISSION, CONFUSION, COUNT_ERROR)  # headed as `concept_presence` names them


class Scores(NamedTuple):
    """What was measured of one picture.

    Attributes:
        numbers: By `Measure.key`; those of the truth only where it is known.
        image_by_concept: Image alignment with each concept.
    """

    numbers: dict[str, float]
    image_by_concept: dict[str, float]


class Judge:
    """Measures pictures; every prompt and reference is embedded once."""

    def __init__(self, config: BenchmarkConfig, device: torch.device | str) -> None:
        self._config = config
        self.clip = load_clip(config.clip).to(device)
        self._encoder: ImageEncoder = self.clip
        if config.image_encoder is not None:
            self._encoder = VisionBackbone.from_pretrained(config.image_encoder).to(device)
        self._texts = TextCache(self.clip)
        used = dict.fromkeys(name for names in config.compositions for name in names)
        self._references = {name: embed_images(self._encoder, self.pictures(name)) for name in used}
        self._oracle: Any = None
        if all(config.concepts[name].references == "toybox" for name in used):
            from mole_diffusion.toybox.oracle import Oracle

            self._oracle = Oracle()
            find = oracle_detector(self._oracle)
            self._regions = {
                name: embed_images(self._encoder, reference_regions(find, name, self.pictures(name))) for name in used
            }

    def measure(self, pictures: Sequence[Image.Image], cells: Sequence[Cell]) -> list[Scores]:
        """All numbers of pictures that were drawn together, as to the concepts that were kept."""
        names = cells[0].kept
        features = embed_images(self.clip, pictures)
        text = self._texts.embed([self._config.prompt(cell.prompt, names, described=True) for cell in cells])
        texts = {
            TEXT.key: text_alignment(features, text, "clipscore"),
            TEXT_COSINE.key: text_alignment(features, text, "cosine"),
        }
        seen = features if self._encoder is self.clip else embed_images(self._encoder, pictures)
        aligned = {name: image_alignment(seen, self._references[name]) for name in names}
        looks = [{} for _ in pictures] if self._oracle is None else self._look(pictures, names)
        scores = []
        for index, look in enumerate(looks):
            by_concept = {name: values[index].item() for name, values in aligned.items()}
            numbers = {key: values[index].item() for key, values in texts.items()}
            numbers[IMAGE.key] = _mean(list(by_concept.values()))
            scores.append(Scores(numbers | look, by_concept))
        return scores

    def _look(self, pictures: Sequence[Image.Image], names: Sequence[str]) -> list[dict[str, float]]:
        from mole_diffusion.toybox.oracle import judge

        looks = []
        for picture, detections in zip(pictures, self._oracle.detect(pictures), strict=True):
            boxes = {name: finding.box for name, finding in judge(detections, names).items()}
            regions = [region_alignment(self._encoder, picture, boxes[name], self._regions[name]) for name in names]
            truth = concept_presence(detections, names)
            looks.append(
                {
                    **{measure.key: truth[measure.heading] for measure in TRUTHS},
                    REGION.key: _mean([score for score, _ in regions]),
                    DETECTION.key: _mean([float(found) for _, found in regions]),
                }
            )
        return looks

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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
