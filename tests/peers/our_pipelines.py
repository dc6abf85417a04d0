"""A plugin for pytest that puts our pipelines in the place of diffusers', for `run_diffusers_tests.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import diffusers  # before the checkout's own sources come into the path: the installed one is tested
import pytest
from stand_ins import write_stand_ins

from mole_diffusion import pipelines

PUT = os.environ["MOLE_PEER_PIPELINES"] == "our"
TASKS = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")

if PUT:
    for task in TASKS:
        setattr(diffusers, task, getattr(pipelines, f"MoLE{task}"))

if os.environ.get("MOLE_PEER_STAND_INS"):
    write_stand_ins(Path(os.environ["HF_HUB_CACHE"]))


def pytest_collection_finish(session: Any) -> None:
    """Makes sure that the tests use what they should."""
    for item in session.items:
        tested = getattr(item.cls, "pipeline_class", None)
        if tested is not None and issubclass(tested, pipelines.MoLEPipelineMixin) is not PUT:
            raise pytest.UsageError(f"{item.nodeid} tests {tested.__name__}, which is not what was put in its place")
