"""Krea 2."""

from __future__ import annotations

from mole_diffusion import MoLEKrea2Pipeline
from tests.families.contract import PipelineContract, StepContract, WholeContract
from tests.families.transformers import DOWN, case

CALL = {"max_sequence_length": 32, "guidance_scale": 0.0}
SCALE = "attention_kwargs"


class TestKrea2(WholeContract):
    case = case("krea2", MoLEKrea2Pipeline, CALL, scale=SCALE)
    descent = DOWN, {"max_sequence_length": 512}
    guidance = 1.0  # none, which its pipeline calls 0


class TestGuidance(PipelineContract, StepContract):
    case = case("krea2", MoLEKrea2Pipeline, {**CALL, "guidance_scale": 3.0, "negative_prompt": "sand"}, scale=SCALE)
