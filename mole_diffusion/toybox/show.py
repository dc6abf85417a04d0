"""A sheet of the subjects and of the world they live in."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mole_diffusion.sheets import picture_sheet

from .render import render
from .subjects import SUBJECTS, references
from .world import MAX_OBJECTS, random_scene


def show(out: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """Writes a PNG with every subject's reference pictures, then random scenes of 1 to 6 objects; returns its path."""
    rows = [(f"{item.token}\n{item.class_name}", references(name)) for name, item in SUBJECTS.items()]
    rng = np.random.default_rng(seed)
    for number in range(1, MAX_OBJECTS + 1):
        scenes = [render(random_scene(rng, number)) for _ in range(5)]
        rows.append((f"{number} object{'s' if number > 1 else ''}", scenes))
    return picture_sheet(rows, Path(out), title="subjects of the toybox, and scenes of its world")
