"""LoRAs beside a ControlNet and beside an IP-Adapter: both act as without LoRAs, and LoRAs as without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from torch import Tensor

from mole_diffusion.composition import RegionMap
from mole_diffusion.pipelines import MoLEPipelineMixin
from tests.composing import NAMES, assert_close, composing_pipeline, draw, lora_states
from tests.merging import merge_state

PROMPT = "a photo of a cat, a dog and a mug"


class Controlled(MoLEPipelineMixin, StableDiffusionControlNetPipeline):
    pass


def controlled(pipe: Any, cls: Any) -> Any:
    """`pipe`'s models with a ControlNet that does something; made from the bare UNet before any LoRA."""
    # Two sizes of its embedding halve the picture once, as the tiny autoencoder does.
    unet = composing_pipeline().unet
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32)).eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(4)
        for block in controlnet.controlnet_down_blocks:
            block.weight.normal_(std=0.1)
    made = cls(**pipe.components, controlnet=controlnet, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def with_adapter(pipe: Any) -> Any:
    """`pipe` with an IP-Adapter of random weights on it."""
    generator = torch.Generator().manual_seed(5)
    width, image_width = pipe.unet.config.cross_attention_dim, 8

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 4

    layers: dict[str, Tensor] = {}
    crossed = [name for name in pipe.unet.attn_processors if "attn2" in name]
    for index, name in enumerate(crossed):
        features = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * index + 1}.{part}.weight"] = random(features, width)
    projection = {
        "proj.weight": random(4 * width, image_width),
        "proj.bias": random(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    return pipe


EMBEDS = [torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(6))]
CONTROL = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def options(kind: str) -> dict[str, Any]:
    beside: dict[str, Any] = {"ip_adapter_image_embeds": EMBEDS} if kind == "adapter" else {"image": CONTROL}
    return {"num_inference_steps": 4, **beside}


def pipeline(kind: str, *, loras: bool, merged: str | None = None) -> Any:
    pipe = composing_pipeline()
    if merged is not None:
        merge_state(pipe, lora_states(pipe)[merged])
    made = with_adapter(pipe) if kind == "adapter" else controlled(pipe, Controlled)
    if loras:
        made.load_loras({name: lora_states(made)[name] for name in NAMES})
    return made


@pytest.mark.parametrize("kind", ["adapter", "controlnet"])
def test_one_lora_beside_it_is_that_lora_merged_and_none_is_the_base(kind: str) -> None:
    pipe = pipeline(kind, loras=True)
    pipe.set_composition("linear")
    base = pipeline(kind, loras=False)
    assert torch.equal(draw(pipe, PROMPT, loras=[], **options(kind)), draw(base, PROMPT, **options(kind)))
    merged = draw(pipeline(kind, loras=False, merged="cat"), PROMPT, **options(kind))
    assert_close(draw(pipe, PROMPT, loras=["cat"], **options(kind)), merged)


@pytest.mark.parametrize("kind", ["adapter", "controlnet"])
@pytest.mark.parametrize("method", ["masks", "freefuse", "norm_router"])
def test_methods_that_bind_work_beside_it(kind: str, method: str) -> None:
    pipe = pipeline(kind, loras=True)
    pipe.set_composition(method)
    first = draw(pipe, PROMPT, **options(kind))
    assert torch.equal(draw(pipe, PROMPT, **options(kind)), first)
    assert not torch.equal(draw(pipe, PROMPT, loras=[], **options(kind)), first)
    if method != "norm_router":
        draw(pipe, PROMPT, **options(kind))
        assert isinstance(pipe.masks, RegionMap)


@pytest.mark.parametrize("kind", ["adapter", "controlnet"])
@pytest.mark.parametrize("regions", [None, {"dog": (0.5, 0, 1, 1)}])
def test_masks_and_regions_beside_one_that_is_turned_off_are_those_without_it(kind: str, regions: Any) -> None:
    plain, pipe = composing_pipeline(*NAMES), pipeline(kind, loras=True)
    beside = options(kind)
    if kind == "adapter":
        pipe.set_ip_adapter_scale(0.0)
    else:
        beside["controlnet_conditioning_scale"] = 0.0
    for one in (plain, pipe):
        one.set_composition("masks")
    expected = draw(plain, PROMPT, num_inference_steps=4, regions=regions)
    assert_close(draw(pipe, PROMPT, regions=regions, **beside), expected)
    torch.testing.assert_close(pipe.masks.values, plain.masks.values)
    assert pipe.masks.fixed == plain.masks.fixed == (() if regions is None else ("dog",))


def test_an_ip_adapter_that_comes_after_the_loras() -> None:
    before, after = pipeline("adapter", loras=True), composing_pipeline(*NAMES)
    with_adapter(after)
    for pipe in (before, after):
        pipe.set_composition("masks")
    assert_close(draw(after, PROMPT, **options("adapter")), draw(before, PROMPT, **options("adapter")))
