"""What a benchmark measures of every picture."""

from __future__ import annotations

from dataclasses import dataclass

from mole_diffusion.metrics.alignment import text_name


@dataclass(frozen=True)
class Measure:
    """One number of a picture.

    Attributes:
        key: Its name in rows and in CSV files.
        heading: Its name in the tables of a report.
        higher_is_better: Whether more of it is better.
    """

    key: str
    heading: str
    higher_is_better: bool = True


TEXT = Measure("text_clipscore", text_name("clipscore"))
IMAGE = Measure("image", "image alignment")
REGION = Measure("region", "region alignment")
PRESENCE = Measure("presence", "presence rate")
ALL_PRESENT = Measure("all_present", "all-present rate")
OMISSION = Measure("omission", "omission rate", higher_is_better=False)
CONFUSION = Measure("confusion", "confusion rate", higher_is_better=False)
TEXT_COSINE = Measure("text_cosine", text_name("cosine"))
DETECTION = Measure("detection", "detection rate")
COUNT_ERROR = Measure("count_error", "count error", higher_is_better=False)

SHOWN = (TEXT, IMAGE, REGION, PRESENCE, ALL_PRESENT, OMISSION, CONFUSION)
"""Those that tables in the report have room for; the others are in the CSV files."""

MEASURES = (*SHOWN, TEXT_COSINE, DETECTION, COUNT_ERROR)
