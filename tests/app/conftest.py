"""One studio for the tests of a file."""

from __future__ import annotations

import pytest

from mole_diffusion.app.studio import Studio


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio("cpu")
