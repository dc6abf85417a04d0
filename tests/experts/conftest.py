"""LoRAs on tiny models, for what compiled graphs have of them."""

from __future__ import annotations

from typing import Any

import pytest

from mole_diffusion.experts import Experts
from tests.running import make_lora, models
from tests.tiny import ATTENTION, CONVOLUTIONS, tiny_components


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return tiny_components()


@pytest.fixture(scope="module")
def experts(tiny: dict[str, Any]) -> Any:
    """Of several ranks and scalings, and not all at all modules."""
    loras = [
        make_lora(tiny, "cat", 0, rank=3),
        make_lora(tiny, "boot", 1, rank=2, alpha=1.0, targets=(ATTENTION,)),
        make_lora(tiny, "mug", 2, rank=4, targets=(ATTENTION, CONVOLUTIONS)),
    ]
    experts = Experts(loras)
    experts.attach(models(tiny))
    yield experts
    experts.detach()
