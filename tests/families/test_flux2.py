"""FLUX.2, klein and dev."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline

from mole_diffusion import MoLEFlux2KleinInpaintPipeline, MoLEFlux2KleinPipeline, MoLEFlux2Pipeline
from mole_diffusion.families.latents import from_patches
from mole_diffusion.training import GateTrainingConfig
from mole_diffusion.training.gates.walk import Walker
from tests.families.contract import PROMPT, PipelineContract, StepContract, WholeContract, assert_same, draw
from tests.families.transformers import DOWN, case, mask, picture

CALL = {"max_sequence_length": 48, "guidance_scale": 1.0}
SCALE = "attention_kwargs"
LOOKED_AT = picture(64)  # none smaller is taken
PAINTED = {**CALL, "image": LOOKED_AT, "mask_image": mask(64), "strength": 0.9, "num_inference_steps": 3}


class TestKlein(WholeContract):
    case = case("flux2_klein", MoLEFlux2KleinPipeline, CALL, scale=SCALE)
    descent = DOWN, {"max_sequence_length": 512}

    @torch.no_grad()
    def test_a_walk_ends_where_a_call_of_the_pipeline_does(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its pipeline takes noise that is not packed, and hands latents out as its autoencoder wants them."""
        monkeypatch.setattr(pipe, "scheduler", DOWN)
        pipe.init_gates()
        walker = Walker(pipe, GateTrainingConfig(rollout_steps=4, guidance_scale=3.0, batch_size=1))
        plan = walker.plan(torch.Generator().manual_seed(0))
        latents = plan.noise
        with pipe.composing():
            for now, after in zip(plan.timesteps, plan.timesteps[1:], strict=False):
                prediction = walker.predict(latents, now, walker.encode([PROMPT]))
                latents = walker.advance(prediction, latents, now, after, None)
        noise = plan.noise.transpose(1, 2).unflatten(2, (8, 8))
        drawn = draw(self.case, pipe, latents=noise, num_inference_steps=4, guidance_scale=3.0, max_sequence_length=512)
        norm = pipe.vae.bn
        latents = latents * (norm.running_var + pipe.vae.config.batch_norm_eps).sqrt() + norm.running_mean
        assert_same(from_patches(latents), drawn)


class TestGuidance(PipelineContract, StepContract):
    case = case("flux2_klein", MoLEFlux2KleinPipeline, {**CALL, "guidance_scale": 3.0}, scale=SCALE)


class TestPicturesToLookAt(PipelineContract):
    case = case("flux2_klein", MoLEFlux2KleinPipeline, {**CALL, "image": LOOKED_AT}, scale=SCALE)


class TestInpaint(PipelineContract):
    case = case("flux2_klein", MoLEFlux2KleinInpaintPipeline, PAINTED, stock=Flux2KleinInpaintPipeline, scale=SCALE)


class TestDev(PipelineContract):
    case = case("flux2", MoLEFlux2Pipeline, {**CALL, "max_sequence_length": 64, "image": LOOKED_AT}, scale=SCALE)
