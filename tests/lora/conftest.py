"""What the tests of LoRA files share."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest

from mole_diffusion.lora.skeletons import Skeleton
from tests.tiny import tiny_components


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return tiny_components()


@pytest.fixture(scope="session", autouse=True)
def _shells_once() -> Iterator[None]:
    """Shells of the published models, which nobody changes, are built once; each takes up to a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Skeleton, "build", functools.cache(Skeleton.build))
        yield
