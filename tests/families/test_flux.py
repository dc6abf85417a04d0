"""FLUX.1."""

from __future__ import annotations

from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline

from mole_diffusion import MoLEFluxImg2ImgPipeline, MoLEFluxInpaintPipeline, MoLEFluxPipeline
from tests.families.contract import PipelineContract, StepContract, WholeContract
from tests.families.transformers import DOWN, case, mask, picture

CALL = {"max_sequence_length": 32, "guidance_scale": 3.5}
GUIDED = {**CALL, "true_cfg_scale": 3.0, "negative_prompt": "sand"}
FROM = {**CALL, "image": picture(), "strength": 0.9, "num_inference_steps": 3}
PAINTED = {**FROM, "mask_image": mask()}
SCALE = "joint_attention_kwargs"


class TestFlux(WholeContract):
    case = case("flux", MoLEFluxPipeline, CALL, scale=SCALE)
    descent = DOWN, {"max_sequence_length": 512}
    guidance = 1.0  # its own is told to the transformer


class TestTrueGuidance(PipelineContract, StepContract):
    case = case("flux", MoLEFluxPipeline, GUIDED, scale=SCALE)


class TestImg2Img(PipelineContract):
    case = case("flux", MoLEFluxImg2ImgPipeline, FROM, stock=FluxImg2ImgPipeline, scale=SCALE)


class TestInpaint(PipelineContract):
    case = case("flux", MoLEFluxInpaintPipeline, PAINTED, stock=FluxInpaintPipeline, scale=SCALE)
