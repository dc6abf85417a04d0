"""Z-Image."""

from __future__ import annotations

from diffusers import ZImageImg2ImgPipeline, ZImageInpaintPipeline

from mole_diffusion import MoLEZImageImg2ImgPipeline, MoLEZImageInpaintPipeline, MoLEZImagePipeline
from tests.families.contract import PipelineContract, StepContract, WholeContract
from tests.families.transformers import DOWN, case, mask, picture

CALL = {"max_sequence_length": 48, "guidance_scale": 0.0}
# Longer than the prompt, also when both are filled up to 32 tokens.
GUIDED = {**CALL, "guidance_scale": 3.0, "negative_prompt": "sand and sand " * 8}
FROM = {**CALL, "image": picture(), "strength": 0.9, "num_inference_steps": 3}
PAINTED = {**FROM, "mask_image": mask()}
SCALE = "joint_attention_kwargs"


class TestZImage(WholeContract):
    case = case("z_image", MoLEZImagePipeline, CALL, scale=SCALE)
    descent = DOWN, {}
    guidance = 1.0  # none, which its pipeline calls 0


class TestGuidance(PipelineContract, StepContract):
    case = case("z_image", MoLEZImagePipeline, GUIDED, scale=SCALE)


class TestImg2Img(PipelineContract):
    case = case("z_image", MoLEZImageImg2ImgPipeline, FROM, stock=ZImageImg2ImgPipeline, scale=SCALE)


class TestInpaint(PipelineContract):
    case = case("z_image", MoLEZImageInpaintPipeline, PAINTED, stock=ZImageInpaintPipeline, scale=SCALE)
