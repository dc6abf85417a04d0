"""What the tests of metrics share: the toybox's CLIP."""

from __future__ import annotations

import pytest

from mole_diffusion import toybox
from mole_diffusion.clip import DifferentiableCLIP


@pytest.fixture(scope="session")
def toybox_clip() -> DifferentiableCLIP:
    """The CLIP that comes along, which no test changes."""
    return DifferentiableCLIP(toybox.clip_dir())
