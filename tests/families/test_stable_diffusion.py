"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from mole_diffusion import (
    MoLEStableDiffusionControlNetImg2ImgPipeline,
    MoLEStableDiffusionControlNetInpaintPipeline,
    MoLEStableDiffusionControlNetPipeline,
    MoLEStableDiffusionImg2ImgPipeline,
    MoLEStableDiffusionInpaintPipeline,
    MoLEStableDiffusionPipeline,
)
from tests.families.contract import MASK, PICTURE, Case, PipelineContract, WholeContract
from tests.tiny import tiny_components
from tests.tiny.families import controlnet

GUIDED = {"guidance_scale": 3.0}
UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def with_controlnet() -> dict[str, Any]:
    parts = tiny_components()
    return {**parts, "controlnet": controlnet(parts["unet"])}


class TestStableDiffusion(WholeContract):
    case = Case(MoLEStableDiffusionPipeline, StableDiffusionPipeline, tiny_components, GUIDED, UNCHECKED)
    descent = (
        DDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
        ),
        {},
    )


class TestImg2Img(PipelineContract):
    case = Case(
        MoLEStableDiffusionImg2ImgPipeline,
        StableDiffusionImg2ImgPipeline,
        tiny_components,
        {**GUIDED, "image": PICTURE, "strength": 0.9, "num_inference_steps": 3},
        UNCHECKED,
    )


class TestInpaint(PipelineContract):
    case = Case(
        MoLEStableDiffusionInpaintPipeline,
        StableDiffusionInpaintPipeline,
        tiny_components,
        {**GUIDED, "image": PICTURE, "mask_image": MASK, "height": 32, "width": 32},
        UNCHECKED,
    )


class TestControlNet(PipelineContract):
    case = Case(
        MoLEStableDiffusionControlNetPipeline,
        StableDiffusionControlNetPipeline,
        with_controlnet,
        {**GUIDED, "image": PICTURE},
        UNCHECKED,
    )


class TestControlNetImg2Img(PipelineContract):
    case = Case(
        MoLEStableDiffusionControlNetImg2ImgPipeline,
        StableDiffusionControlNetImg2ImgPipeline,
        with_controlnet,
        {**GUIDED, "image": PICTURE, "control_image": PICTURE},
        UNCHECKED,
    )


class TestControlNetInpaint(PipelineContract):
    case = Case(
        MoLEStableDiffusionControlNetInpaintPipeline,
        StableDiffusionControlNetInpaintPipeline,
        with_controlnet,
        {**GUIDED, "image": PICTURE, "mask_image": MASK, "control_image": PICTURE},
        UNCHECKED,
    )
