"""What the tests of LoRA files share."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny import tiny_components


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return tiny_components()
