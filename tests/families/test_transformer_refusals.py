"""What is done to a transformer that LoRAs cannot follow is refused: caches, fused and compiled layers."""

from __future__ import annotations

import re
from typing import Any

import diffusers
import pytest
import torch
import torch._dynamo
from diffusers import hooks
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

import mole_diffusion
from mole_diffusion.composition import Switch
from mole_diffusion.errors import MoLEError
from tests.families.transformers import REGIONS, UNGUIDED, loaded, with_triggers
from tests.tiny import random_lora
from tests.tiny.dits import denoiser_call, draw, tiny_dit


@pytest.fixture
def pipe(family: str) -> Any:
    pipe = loaded(family)
    pipe.set_composition("linear")
    return pipe


CACHES: dict[str, Any] = {
    "FirstBlockCacheConfig": {"threshold": 0.0},
    "FasterCacheConfig": {
        "is_guidance_distilled": True,
        "tensor_format": "BCHW",
        "current_timestep_callback": lambda: 900,
    },
    "MagCacheConfig": {"calibrate": True},
    "PyramidAttentionBroadcastConfig": {
        "spatial_attention_block_skip_range": 2,
        "current_timestep_callback": lambda: 900,
    },
    "SeaCacheConfig": {},
    "TaylorSeerCacheConfig": {},
    "TextKVCacheConfig": {},
}


def test_every_cache_of_diffusers_is_known_here() -> None:
    names = [name for name in dir(hooks) if name.endswith(("CacheConfig", "BroadcastConfig"))]
    assert sorted(names) == sorted(CACHES)


@pytest.mark.parametrize("name", CACHES)
def test_caches_are_refused_where_weights_change(name: str) -> None:
    """And the remedy of the error is one. (Only Cosmos' transformers can have SeaCache, only Nucleus' TextKVCache.)"""
    pipe = loaded("flux")
    pipe.set_composition("switch")
    expected = draw(pipe, "flux", num_inference_steps=1)
    try:
        pipe.transformer.enable_cache(getattr(hooks, name)(**CACHES[name]))
        refused = rf"{name}.*composition 'switch'.*`transformer.disable_cache\(\)`"
        with pytest.raises(MoLEError, match=refused):
            draw(pipe, "flux")
        assert draw(pipe, "flux", loras=[], num_inference_steps=1).isfinite().all()
        pipe.set_composition("linear")
        assert draw(pipe, "flux", num_inference_steps=1).isfinite().all()
        pipe.set_composition("switch")
    finally:
        if pipe.transformer.is_cache_enabled:
            pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe, "flux", num_inference_steps=1), expected)


def test_a_cache_that_was_put_on_by_hand_is_refused_and_taken_off_as_the_error_says() -> None:
    """Z-Image's transformer, as the UNet, has no `enable_cache`."""
    pipe = loaded("z_image")
    pipe.set_composition("switch")
    expected = draw(pipe, "z_image", num_inference_steps=1)
    hooks.apply_pyramid_attention_broadcast(
        pipe.transformer, hooks.PyramidAttentionBroadcastConfig(**CACHES["PyramidAttentionBroadcastConfig"])
    )
    with pytest.raises(MoLEError, match=r"pyramid_attention_broadcast of diffusers.*switch") as refused:
        draw(pipe, "z_image")
    (remedy,) = re.findall("Take them off: `(.*?)`", str(refused.value))
    exec(remedy, {"diffusers": diffusers, "pipe": pipe})
    assert torch.equal(draw(pipe, "z_image", num_inference_steps=1), expected)


@pytest.mark.parametrize("family", ["flux2_klein"])
def test_keys_and_values_kept_from_an_earlier_step_are_refused(family: str, pipe: Any) -> None:
    model, given = pipe.transformer, denoiser_call(family)[1]
    with pipe.experts.using(weigher=Switch()), pytest.raises(MoLEError, match="kv_cache_mode='extract'"):
        model(**{**given, "kv_cache_mode": "extract"})


@pytest.mark.parametrize("family", ["flux"])
def test_projections_fused_after_loading_are_refused(family: str, pipe: Any) -> None:
    draw(pipe, family)
    pipe.transformer.fuse_qkv_projections()
    try:
        with pytest.raises(MoLEError, match="fused query, key and value projections"):
            draw(pipe, family)
    finally:
        pipe.transformer.unfuse_qkv_projections()
    assert draw(pipe, family).isfinite().all()


@pytest.mark.parametrize("family", ["krea2"])
def test_compiled_blocks_draw_the_same_or_say_why_not(family: str, pipe: Any) -> None:
    """Regional compilation; attention inside of a graph is neither seen nor drawn to words."""
    with_triggers(pipe, {"a": "cat", "b": "dog"})
    once = {"num_inference_steps": 1, **UNGUIDED[family]}
    expected = draw(pipe, family, **once)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    try:
        torch.testing.assert_close(draw(pipe, family, **once), expected, rtol=0, atol=1e-4)
        pipe.set_composition("masks")
        for asked in ({}, {"regions": REGIONS}):
            with pytest.raises(
                MoLEError, match=r"'masks' reads the attention.*compile_repeated_blocks.*such as budget"
            ):
                draw(pipe, family, **once, **asked)
        pipe.set_composition("budget")
        assert draw(pipe, family, **once).isfinite().all()
    finally:
        for part in pipe.transformer.modules():
            part._compiled_call_impl = None
        torch._dynamo.reset()
    pipe.set_composition("masks")
    assert draw(pipe, family, **once, regions=REGIONS).isfinite().all()


class ByHand(FluxAttnProcessor):
    """An attention of somebody else's, which calls nothing that others call."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return attn.to_v(hidden_states)


def test_attention_that_nobody_sees_is_an_error_where_it_must_be_seen() -> None:
    pipe = tiny_dit("flux", mole_diffusion.MoLEFluxPipeline)
    parts = {"transformer": pipe.transformer}
    pipe.load_loras(
        {name: random_lora(parts, rank=2, targets="to_v$", seed=s) for s, name in enumerate(["cat", "dog"])}
    )
    pipe.transformer.single_transformer_blocks[1].attn.set_processor(ByHand())
    pipe.set_composition("masks")
    where = r"single_transformer_blocks.1.attn \(ByHand\).*set_attention_backend\(\"native\"\).*norm_router"
    with pytest.raises(MoLEError, match=where):
        draw(pipe, "flux")
    pipe.set_composition("norm_router")
    assert draw(pipe, "flux").isfinite().all()
    pipe.set_composition("masks")
    pipe.transformer.single_transformer_blocks[1].attn.set_processor(FluxAttnProcessor())
    assert draw(pipe, "flux").isfinite().all()  # nothing is left of the first try
