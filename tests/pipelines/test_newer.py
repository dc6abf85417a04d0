"""Pipelines that an older diffusers does not have say so, and only when they are opened."""

from __future__ import annotations

import re

import diffusers
import pytest
from packaging.version import Version

from mole_diffusion.errors import MoLEError
from mole_diffusion.pipelines import MoLEPipelineMixin
from mole_diffusion.pipelines.newer import newer
from tests import ROOT


def test_a_pipeline_that_diffusers_lacks_names_the_version_that_has_it() -> None:
    class MoLETomorrowPipeline(MoLEPipelineMixin, newer("TomorrowPipeline", since="99.1")):
        pass

    message = (
        rf"MoLETomorrowPipeline needs diffusers 99.1 or newer, and this is {re.escape(diffusers.__version__)}. "
        r"Upgrade it: pip install 'diffusers>=99.1'"
    )
    for opened in (
        MoLETomorrowPipeline,
        lambda: MoLETomorrowPipeline.from_pretrained("base"),
        lambda: MoLETomorrowPipeline.from_single_file("base.safetensors"),
    ):
        with pytest.raises(MoLEError, match=message):
            opened()


def test_the_versions_named_are_those_that_have_the_pipelines() -> None:
    named = [
        match.groups()
        for file in (ROOT / "pipelines").glob("*.py")
        for match in re.finditer(r'newer\("(\w+)", since="([\d.]+)"\)', file.read_text(encoding="utf-8"))
    ]
    assert len(named) == 7
    for name, since in named:
        assert hasattr(diffusers, name) == (Version(diffusers.__version__) >= Version(since)), name
