"""A real Stable Diffusion 1.x LoRA, the same numbers in two layouts, on the real models' modules (without weights)."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from mole_diffusion.lora import LoRAError, inspect_lora, load_lora
from tests import ROOT
from tests.lora_files import same_factors
from tests.tiny import tiny_components

FOLDER = ROOT.parent / "shared" / "data" / "loras"
KOHYA = FOLDER / "sd15_disney_kohya.safetensors"
DIFFUSERS = FOLDER / "sd15_disney_diffusers.safetensors"

# Somebody's LoRA, which this repository may not contain; tests/lora/ read all layouts without it.
pytestmark = pytest.mark.skipif(
    not (KOHYA.is_file() and DIFFUSERS.is_file()), reason=f"no real LoRA files beside the repository, in {FOLDER}"
)


@pytest.fixture(scope="module")
def stable_diffusion() -> dict[str, nn.Module]:
    """Modules of Stable Diffusion 1.5 on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    return {"unet": unet, "text_encoder": text_encoder}


def test_both_layouts_give_the_same_factors(stable_diffusion: dict[str, nn.Module]) -> None:
    kohya, diffusers = load_lora(KOHYA, stable_diffusion), load_lora(DIFFUSERS, stable_diffusion)
    assert (kohya.layout, diffusers.layout) == ("kohya", "diffusers")
    same_factors(kohya, diffusers)
    assert {component: len(modules) for component, modules in kohya.factors.items()} == {
        "unet": 144,
        "text_encoder": 48,
    }
    assert kohya.ranks == (1, 1)


def test_reports() -> None:
    kohya, diffusers = inspect_lora(KOHYA), inspect_lora(DIFFUSERS)
    assert kohya.modules == diffusers.modules == {"unet": 144, "text_encoder": 48}
    assert kohya.family == diffusers.family == "Stable Diffusion 1.x"
    assert (kohya.alphas, diffusers.alphas) == ((1.0,), ())
    assert kohya.ranks == {1: 192}


def test_another_model_is_refused_by_name() -> None:
    with pytest.raises(LoRAError, match=r"find no place in the model: .* looks like Stable Diffusion 1\.x .*width 768"):
        load_lora(KOHYA, tiny_components())
