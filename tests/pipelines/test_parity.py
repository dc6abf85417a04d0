"""One LoRA at weight 1 draws what diffusers' own loader draws from the same file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mole_diffusion.lora import load_lora, save_lora
from tests.composing import assert_close, composing_pipeline, draw, lora_states
from tests.tiny import tiny_pipeline

pytest.importorskip("peft", reason="diffusers loads LoRAs through peft")


def adapter(pipe: Any, name: str) -> Any:
    return load_lora(lora_states(pipe)[name], pipe.lora_components, name=name)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_one_lora_draws_as_diffusers_draws_it(tmp_path: Path, layout: Any) -> None:
    ours, stock = composing_pipeline(), tiny_pipeline()
    # Only attention and no alpha in the text encoder, which diffusers reads right (it drops per-module alphas there).
    file = save_lora(adapter(ours, "mug" if layout == "kohya" else "cat"), tmp_path / "lora.safetensors", layout=layout)
    base = draw(ours)
    ours.load_loras({"it": file})
    stock.load_lora_weights(str(file.parent), weight_name=file.name)
    drawn = draw(ours)
    assert_close(drawn, draw(stock))
    assert not torch.allclose(drawn, base, atol=0.05)


@pytest.mark.parametrize("component", ["text_encoder", "unet"])
def test_loras_of_one_component_alone_draw_as_diffusers_draws_them(tmp_path: Path, component: str) -> None:
    ours, stock = composing_pipeline(), tiny_pipeline()
    whole = adapter(ours, "cat")
    part = replace(whole, factors={component: whole.factors[component]})
    file = save_lora(part, tmp_path / "lora.safetensors")
    stock.load_lora_weights(str(tmp_path), weight_name=file.name)
    expected, base = draw(stock), draw(ours)
    ours.load_loras({"it": file})
    for method in ("linear", "budget", "norm_router", "masks", "composite"):
        ours.set_composition(method)
        assert_close(draw(ours), expected)
    ours.set_composition("linear")
    ours.fuse_lora()
    assert_close(draw(ours), expected)
    ours.unfuse_lora()
    ours.init_gates()
    for drawn in (expected, draw(ours)):
        assert not torch.allclose(drawn, base, atol=0.01)
    assert_close(draw(ours, loras=[]), base)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_several_loras_draw_as_diffusers_sums_them(tmp_path: Path) -> None:
    ours, stock = composing_pipeline(), tiny_pipeline()
    scales = {"cat": 0.7, "mug": 0.4}
    for name in scales:
        file = save_lora(adapter(ours, name), tmp_path / f"{name}.safetensors")
        ours.load_loras({name: file})
        stock.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name=name)
    stock.set_adapters(list(scales), list(scales.values()))
    ours.set_composition("linear")
    assert_close(draw(ours, loras=scales), draw(stock))


def test_a_lora_of_diffusers_can_lie_on_top() -> None:
    both = composing_pipeline("cat")
    both.load_lora_weights(lora_states(both)["mug"], adapter_name="stock")
    both.set_composition("linear")
    expected = composing_pipeline("cat", "mug")
    expected.set_composition("linear")
    assert_close(draw(both), draw(expected))
