"""Methods that bind beside what else acts on a call: guidance, tasks, processors, tiles, stock pipelines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPAGPipeline, StableDiffusionPipeline, StableDiffusionSAGPipeline
from PIL import Image
from torch import Tensor

from mole_diffusion.composition import Masks, RegionMap
from mole_diffusion.errors import MoLEError
from mole_diffusion.pipelines import (
    MoLEPipelineMixin,
    MoLEStableDiffusionImg2ImgPipeline,
    MoLEStableDiffusionInpaintPipeline,
)
from tests.composing import NAMES, assert_close, draw, lora_states
from tests.composition.binding import PROMPT, REGIONS, four, fresh
from tests.tiny import tiny_components


@pytest.fixture(scope="module")
def pipe() -> Any:
    return fresh()


class Perturbed(MoLEPipelineMixin, StableDiffusionPAGPipeline):
    """A pipeline whose guidance runs every prompt once more, with attention that is spoilt."""


@pytest.mark.parametrize("guidance_scale", [0.0, 5.0])
def test_masks_are_not_read_where_guidance_spoils_attention(guidance_scale: float) -> None:
    found = []
    for scale in (0.0, 1e-6):  # the weakest that runs the third part
        unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe: Any = Perturbed(**tiny_components(), **unused, pag_applied_layers=["mid", "up"])
        pipe.load_loras(lora_states(pipe), triggers={name: name for name in NAMES})
        draw(pipe, PROMPT, num_inference_steps=5, guidance_scale=guidance_scale, pag_scale=scale)
        found.append(pipe.masks.values)
    assert_close(found[1], found[0])


class Guided(MoLEPipelineMixin, StableDiffusionSAGPipeline):
    """A pipeline that exchanges a processor while it draws, and gives it back where the call ends well."""


def test_a_call_that_is_refused_leaves_no_processor_behind() -> None:
    components = {**tiny_components(), "safety_checker": None, "feature_extractor": None}
    pipe: Any = Guided(**components, requires_safety_checker=False)
    pipe.load_loras(lora_states(pipe))
    plain: Any = StableDiffusionPipeline(**components, requires_safety_checker=False)
    pipe.set_composition("composite")
    with pipe.composing():
        drawn = draw(plain, num_inference_steps=1)
    before = pipe.unet.attn_processors
    for draws in (lambda: draw(pipe), lambda: draw(StableDiffusionSAGPipeline(**components))):
        with pytest.raises(MoLEError, match="CrossAttnStoreProcessor"), pipe.composing():
            draws()
        assert all(before[name] is processor for name, processor in pipe.unet.attn_processors.items())
    with pipe.composing():
        assert torch.equal(draw(plain, num_inference_steps=1), drawn)


def test_a_picture_that_is_cut_into_tiles_inside_the_model_is_refused() -> None:
    pipe = fresh("masks")
    layer = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    whole = layer.forward

    def tiled(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # as HyperTile has it
        rows, tokens, _ = hidden_states.shape
        return whole(hidden_states.reshape(rows * 4, tokens // 4, -1), *args, **kwargs).reshape(rows, tokens, -1)

    layer.forward = tiled
    with pytest.raises(MoLEError, match=r"something cuts the picture into tiles at unet\.down_blocks\.0\."):
        four(pipe)
    pipe.set_composition("norm_router")
    assert four(pipe).isfinite().all()


@pytest.mark.parametrize("method", ["masks", Masks(online=True), "freefuse"])
def test_image_to_image_and_inpainting_bind_too(method: Any) -> None:
    pipe = fresh(method)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    ours = (MoLEStableDiffusionImg2ImgPipeline, MoLEStableDiffusionInpaintPipeline)
    for cls, options in zip(ours, ({}, {"mask_image": Image.new("L", (32, 32), 255)}), strict=True):
        other = cls.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        options = {"image": picture, "strength": 0.5, "num_inference_steps": 6, **options}
        first = draw(other, PROMPT, **options)
        assert isinstance(other.masks, RegionMap)
        assert torch.equal(draw(other, PROMPT, **options), first)
        assert not torch.equal(draw(other, PROMPT, loras=[], **options), first)
        placed = draw(other, PROMPT, regions=REGIONS, **options)
        assert other.masks.fixed == ("cat", "dog", "mug")
        assert not torch.equal(placed, first)


def test_a_stock_pipeline_inside_composing_is_told_what_is_missing(pipe: Any) -> None:
    pipe.set_composition("masks")
    stock = StableDiffusionPipeline.from_pipe(pipe)
    stock.set_progress_bar_config(disable=True)
    with pipe.composing(), pytest.raises(ValueError, match="a pipeline of plain diffusers, which do not tell"):
        draw(stock, PROMPT)
    with pytest.raises(ValueError, match=r"outside of a pipeline's call\. Draw with `pipe"):
        draw(stock, PROMPT)


def test_attention_of_somebody_elses_processors_is_seen_too() -> None:
    pipe, sliced = fresh("masks"), fresh("masks")
    sliced.enable_attention_slicing(1)
    assert_close(four(sliced), four(pipe))
    assert torch.equal(sliced.masks.values, pipe.masks.values)


@pytest.mark.parametrize(
    ("method", "regions"), [("masks", None), ("masks", REGIONS), ("freefuse", None), ("norm_router", None)]
)
def test_gradient_checkpointing_changes_nothing(method: str, regions: Any) -> None:
    pipe = fresh(method)
    options: dict[str, Any] = {"loras": {"cat": 0.5, "dog": 1.0, "mug": -0.5}, "regions": regions}
    expected = four(pipe, **options)
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    assert_close(four(pipe, **options), expected)
