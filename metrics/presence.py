"""The truth on the toybox: which concepts a picture shows, and whose look went to the wrong object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import MoLEError
from ..toybox.oracle import Detection, Oracle, judge
from .averages import Averages, refuse_drawn_again
from .pictures import Pictures, as_images

NAMES = ("presence rate", "omission rate", "confusion rate", "all-present rate", "count error")


def concept_presence(detections: Sequence[Detection], concepts: Sequence[str]) -> dict[str, float]:
    """What the objects found in one picture say about the concepts it should show.

    Args:
        detections: The objects found in it.
        concepts: Names of the toybox's subjects.

    Returns:
        "presence rate": share of concepts that stand there in their own look. "omission rate": share of concepts
        without an object of their class. "confusion rate": share of concepts whose object wears another look, or whose
        look another object wears. "all-present rate": 1 if every concept stands there in its own look, else 0.
        "count error": difference between the number of objects and of concepts.

    Raises:
        MoLEError: There is no concept, or one is not a subject of the toybox.
    """
    if not concepts:
        raise MoLEError("there is no concept to look for: `concepts` is empty.")
    findings = judge(detections, concepts).values()
    omitted = sum(not finding.class_present for finding in findings)
    confused = sum(bool(f.leaked_to) or (f.class_present and not f.present) for f in findings)
    present = sum(finding.present for finding in findings)
    count_error = abs(len(detections) - len(concepts))
    rates = [count / len(concepts) for count in (present, omitted, confused)]
    return dict(zip(NAMES, (*rates, float(present == len(concepts)), float(count_error)), strict=True))


class ConceptPresence(Averages):
    """Presence, omission, confusion, all-present rate and count error, averaged over pictures of the toybox.

    Args:
        oracle: The oracle that looks at pictures; by default a new one.
        kwargs: What every `torchmetrics.Metric` takes.
    """

    def __init__(self, oracle: Oracle | None = None, **kwargs: Any) -> None:
        super().__init__(list(NAMES), **kwargs)
        self.oracle = oracle or Oracle()

    def measure(self, images: Pictures, concepts: Sequence[Sequence[str]]) -> Tensor:
        """The numbers of each picture, `(pictures, 5)` in the order of `names`; counts nothing.

        Raises:
            MoLEError: There are none, not as many lists of concepts, a subject is unknown, or a picture is not 64×64.
        """
        seen = as_images(images) if len(concepts) else []
        if not seen or len(seen) != len(concepts):
            raise MoLEError(f"there are {len(seen)} pictures and {len(concepts)} lists of concepts. Give one each.")
        found = self.oracle.detect(seen)
        rows = [list(concept_presence(*pair).values()) for pair in zip(found, concepts, strict=True)]
        return torch.tensor(rows, dtype=torch.float64)

    def update(self, images: Pictures, concepts: Sequence[Sequence[str]]) -> None:
        """Counts pictures, with the subjects each should show. Raises as `measure`, and under `BootStrapper`."""
        refuse_drawn_again(self)
        self.add(self.measure(images, concepts))
