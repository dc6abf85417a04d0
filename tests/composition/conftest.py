"""A pipeline that the tests of one file share."""

from __future__ import annotations

from typing import Any

import pytest

from tests.composing import composing_pipeline, lora_states


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Three LoRAs that are called by "cat", "red dog" and "mug"."""
    pipe = composing_pipeline()
    pipe.load_loras(lora_states(pipe), triggers={"dog": "red dog"})
    return pipe
