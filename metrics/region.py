"""Image alignment of the place that holds a concept, where a missing concept counts as 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from ..errors import MoLEError
from ..toybox.oracle import Oracle
from .alignment import asked_for, check_references, image_alignment
from .averages import Averages, refuse_drawn_again
from .encoders import ImageEncoder
from .features import embed_images
from .pictures import Pictures, as_images

PixelBox: TypeAlias = tuple[int, int, int, int]
Detector: TypeAlias = Callable[[Image.Image, str], PixelBox | None]
"""Where a picture shows a concept: left, top, right, bottom in pixels, or `None` where it does not."""


def oracle_detector(oracle: Oracle | None = None) -> Detector:
    """The toybox's own detector: the box of the object of a subject's class."""
    look = oracle or Oracle()
    return lambda image, concept: look(image, [concept])[concept].box


def reference_regions(detector: Detector, concept: str, references: Sequence[Image.Image]) -> list[Image.Image]:
    """What a concept's pictures hold of it, cut out.

    A cut-out compares with cut-outs: beside a whole picture it may look like nothing at all, and then a method would
    do well to draw nothing, since a miss counts 0. (On the toybox, cosines of the very same object are 0.97 between
    cut-outs and -0.10 between a cut-out and a whole picture.)

    Raises:
        MoLEError: The detector does not find the concept in one of them.
    """
    cut = []
    for index, picture in enumerate(references):
        box = detector(picture, concept)
        if box is None:
            raise MoLEError(
                f"the detector does not find concept {concept!r} in its reference picture {index}. Leave that picture "
                "out, or let the detector give the box of the whole picture."
            )
        cut.append(_cut(picture, box))
    return cut


def region_alignment(
    encoder: ImageEncoder, image: Image.Image, box: PixelBox | None, reference_features: Tensor
) -> tuple[float, bool]:
    """Alignment of what is inside a box with a concept's pictures, and whether there was one.

    Args:
        encoder: CLIP or another backbone.
        image: The whole picture.
        box: What a `Detector` gave.
        reference_features: `(references, width)`, of `reference_regions`.

    Returns:
        Mean cosine, 0 without a box, and whether there is one. Evaluations that leave misses out of the mean reward a
        method that draws a concept rarely but well.

    Raises:
        MoLEError: The box is empty or leaves the picture.
    """
    if box is None:
        return 0.0, False
    features = embed_images(encoder, [_cut(image, box)])
    return image_alignment(features, reference_features).item(), True


def _cut(image: Image.Image, box: PixelBox) -> Image.Image:
    left, top, right, bottom = box
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise MoLEError(f"the detector gave the box {box} in a picture of {image.width}×{image.height} pixels.")
    return image.crop(box)


class RegionAlignment(Averages):
    """Image alignment of the box that holds each concept, a miss counted as 0, with the detection rate beside it.

    Args:
        encoder: CLIP, or a `VisionBackbone` such as DINOv2.
        references: Concept to its pictures; what the detector finds in them is compared.
        detector: Finds a concept in a picture; on the toybox `oracle_detector`.
        kwargs: What every `torchmetrics.Metric` takes.

    Raises:
        MoLEError: There is no concept, one has no pictures, or the detector does not find it in one of them.
    """

    higher_is_better = True

    def __init__(
        self,
        encoder: ImageEncoder,
        references: Mapping[str, Sequence[Image.Image]],
        detector: Detector,
        **kwargs: Any,
    ) -> None:
        check_references(references)
        concepts = list(references)
        super().__init__([*concepts, *(f"detected {name}" for name in concepts)], **kwargs)
        self.concepts = concepts
        self.encoder, self.detector = encoder, detector
        self._features = {
            name: embed_images(encoder, reference_regions(detector, name, pictures))
            for name, pictures in references.items()
        }

    def measure(self, images: Pictures, concepts: Sequence[Sequence[str]] | None = None) -> Tensor:
        """The numbers of each picture, `(pictures, 2 · concepts)` in the order of `names`; counts nothing.

        NaN where a picture should not show a concept.

        Raises:
            MoLEError: As `update`.
        """
        seen = as_images(images)
        wanted = asked_for(concepts, self.concepts, len(seen))
        values = torch.full((len(seen), 2, len(self.concepts)), float("nan"), dtype=torch.float64)
        for row, column in wanted.nonzero().tolist():
            image, name = seen[row], self.concepts[column]
            score, found = region_alignment(self.encoder, image, self.detector(image, name), self._features[name])
            values[row, :, column] = torch.tensor([score, float(found)], dtype=torch.float64)
        return values.flatten(1)

    def update(self, images: Pictures, concepts: Sequence[Sequence[str]] | None = None) -> None:
        """Counts pictures.

        Args:
            images: The pictures.
            concepts: Which concepts each should show; `None`: all.

        Raises:
            MoLEError: There are none, not as many lists of concepts, or a concept or box is wrong; or pictures with
                concepts of their own are drawn again by `BootStrapper`.
        """
        if concepts is not None:
            refuse_drawn_again(self)
        self.add(self.measure(images, concepts))

    def result(self) -> dict[str, float]:
        """Alignment by concept, "mean" over concepts, and "detection rate" over concepts."""
        means = self.means()
        scores = {name: means[name] for name in self.concepts if name in means}
        found = [means[f"detected {name}"] for name in scores]
        return {**scores, "mean": sum(scores.values()) / len(scores), "detection rate": sum(found) / len(found)}
