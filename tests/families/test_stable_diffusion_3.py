"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)

from mole_diffusion import (
    MoLEStableDiffusion3Img2ImgPipeline,
    MoLEStableDiffusion3InpaintPipeline,
    MoLEStableDiffusion3Pipeline,
)
from tests.families.contract import MASK, PICTURE, Case, PipelineContract, WholeContract
from tests.tiny.families import sd3

GUIDED = {"guidance_scale": 3.0, "max_sequence_length": 16, "height": 32, "width": 32}
SCALE = "joint_attention_kwargs"


class TestStableDiffusion3(WholeContract):
    case = Case(MoLEStableDiffusion3Pipeline, StableDiffusion3Pipeline, sd3, GUIDED, scale=SCALE)
    descent = FlowMatchEulerDiscreteScheduler(shift=3.0), {"sigmas": [1.0, 0.75, 0.5, 0.25], "max_sequence_length": 256}


class TestImg2Img(PipelineContract):
    case = Case(
        MoLEStableDiffusion3Img2ImgPipeline,
        StableDiffusion3Img2ImgPipeline,
        sd3,
        {**GUIDED, "image": PICTURE, "strength": 0.9, "num_inference_steps": 3},
        scale=SCALE,
    )


class TestInpaint(PipelineContract):
    case = Case(
        MoLEStableDiffusion3InpaintPipeline,
        StableDiffusion3InpaintPipeline,
        sd3,
        {**GUIDED, "image": PICTURE, "mask_image": MASK},
        scale=SCALE,
    )
