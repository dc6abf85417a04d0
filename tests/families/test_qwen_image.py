"""Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageImg2ImgPipeline, QwenImageInpaintPipeline

from mole_diffusion import MoLEQwenImageImg2ImgPipeline, MoLEQwenImageInpaintPipeline, MoLEQwenImagePipeline
from tests.families.contract import (
    PROMPT,
    GateContract,
    MasksContract,
    PipelineContract,
    RegionContract,
    StepContract,
    TrainingContract,
    assert_same,
    draw,
)
from tests.families.transformers import DOWN, case, mask, picture

GUIDED = {"true_cfg_scale": 3.0, "negative_prompt": "sand"}
FROM = {"image": picture(), "strength": 0.9, "num_inference_steps": 3}
PAINTED = {**FROM, "mask_image": mask()}
SCALE = "attention_kwargs"


class TestQwenImage(PipelineContract, GateContract, RegionContract, StepContract, TrainingContract, MasksContract):
    case = case("qwen_image", MoLEQwenImagePipeline, {}, scale=SCALE)
    descent = DOWN, {}
    guidance = 1.0

    # Several pictures of several prompts are none of the contract here: diffusers 0.42 hands the prompts' masks over in
    # another order than the prompts.
    def test_prompts_of_a_batch_do_not_know_of_one_another(self, pipe: Any) -> None:
        pipe.set_composition("linear")
        prompts = [PROMPT, "a red cat on the grass with a mug"]
        several = draw(self.case, pipe, prompts, generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)])
        for row, prompt in enumerate(prompts):
            alone = draw(self.case, pipe, prompt, generator=torch.Generator().manual_seed(row + 1))
            assert_same(several[row : row + 1], alone)


class TestGuidance(PipelineContract, StepContract):
    case = case("qwen_image", MoLEQwenImagePipeline, GUIDED, scale=SCALE)


class TestImg2Img(PipelineContract):
    case = case("qwen_image", MoLEQwenImageImg2ImgPipeline, FROM, stock=QwenImageImg2ImgPipeline, scale=SCALE)


class TestInpaint(PipelineContract):
    case = case("qwen_image", MoLEQwenImageInpaintPipeline, PAINTED, stock=QwenImageInpaintPipeline, scale=SCALE)
