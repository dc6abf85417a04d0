"""Pictures in the middle of drawing, for every family that the page can open."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import mole_diffusion
from mole_diffusion.app import preview
from mole_diffusion.drawing.settings import PictureSettings
from tests.tiny import tiny_pipeline
from tests.tiny.dits import CALL, tiny_parts
from tests.tiny.families import sd3, sdxl

SETTINGS = PictureSettings("a cat and a dog", height=32, width=16)
TRANSFORMERS = {
    "flux": "Flux",
    "flux2": "Flux2",
    "flux2_klein": "Flux2Klein",
    "krea2": "Krea2",
    "qwen_image": "QwenImage",
    "z_image": "ZImage",
}


def pipeline(family: str) -> Any:
    if family == "stable_diffusion":
        return tiny_pipeline(mole_diffusion.MoLEStableDiffusionPipeline)
    if family == "sdxl":
        return mole_diffusion.MoLEStableDiffusionXLPipeline(**sdxl())
    if family == "sd3":
        return mole_diffusion.MoLEStableDiffusion3Pipeline(**sd3())
    return getattr(mole_diffusion, f"MoLE{TRANSFORMERS[family]}Pipeline")(**tiny_parts(family))


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl", "sd3", *TRANSFORMERS])
def test_the_last_preview_is_the_picture(family: str) -> None:
    """Higher than wide, since a row of patches does not tell its sides."""
    pipe = pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    seen: list[torch.Tensor] = []

    def after_step(_: Any, step: int, time: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return {}

    size = {"height": SETTINGS.height, "width": SETTINGS.width}
    given = {**CALL.get(family, {}), **size, "num_inference_steps": 2, "generator": torch.manual_seed(0)}
    picture = pipe(prompt=SETTINGS.prompt, callback_on_step_end=after_step, **given).images[0]
    last = preview.preview(pipe, seen[-1], SETTINGS)
    assert last is not None
    assert last.size == picture.size == (16, 32)
    assert np.abs(np.asarray(last, dtype=int) - np.asarray(picture, dtype=int)).max() <= 1
    assert np.asarray(picture).std() > 5


def test_a_picture_of_the_base_s_own_size_is_square_and_numbers_beyond_the_format_give_none() -> None:
    pipe = pipeline("flux")
    latents = torch.randn(2, 64, 16)
    found = preview.preview(pipe, latents, replace(SETTINGS, height=None, width=None))
    assert found is not None
    assert found.size == (32, 32)
    assert preview.preview(pipe, latents * float("inf"), replace(SETTINGS, height=None, width=None)) is None


def test_previews_take_little_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    decoded = []

    def decode(*given: Any) -> str:
        nonlocal now
        now += 2.0  # a slow autoencoder
        decoded.append(given)
        return "picture"

    monkeypatch.setattr(preview.time, "monotonic", lambda: now)
    monkeypatch.setattr(preview, "preview", decode)
    previews = preview.Previews()
    for _ in range(100):
        previews.next(None, torch.zeros(1), SETTINGS)
        now += 1.0  # a step
    assert 3 <= len(decoded) <= 6
