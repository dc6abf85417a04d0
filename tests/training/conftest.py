"""What the tests of training share: one random CLIP."""

from __future__ import annotations

import pytest

from mole_diffusion.clip import DifferentiableCLIP
from tests.gate_training import make_clip


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> DifferentiableCLIP:
    """A random small CLIP, which no test changes."""
    return make_clip(tmp_path_factory.mktemp("clip"))
