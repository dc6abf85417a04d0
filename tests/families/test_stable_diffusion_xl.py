"""Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from mole_diffusion import (
    MoLEStableDiffusionXLControlNetImg2ImgPipeline,
    MoLEStableDiffusionXLControlNetInpaintPipeline,
    MoLEStableDiffusionXLControlNetPipeline,
    MoLEStableDiffusionXLImg2ImgPipeline,
    MoLEStableDiffusionXLInpaintPipeline,
    MoLEStableDiffusionXLPipeline,
)
from mole_diffusion.errors import MoLEError
from tests.families.contract import MASK, PICTURE, Case, Noting, PipelineContract, WholeContract, draw, lora_state
from tests.tiny.families import controlnet, sdxl

GUIDED = {"guidance_scale": 3.0}


def with_controlnet() -> dict[str, Any]:
    parts = sdxl()
    return {**parts, "controlnet": controlnet(parts["unet"])}


class TestStableDiffusionXL(WholeContract):
    case = Case(MoLEStableDiffusionXLPipeline, StableDiffusionXLPipeline, sdxl, GUIDED)
    descent = (
        DDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
        ),
        {},
    )

    def test_each_text_encoder_has_its_part_of_a_file(self, pipe: Any) -> None:
        assert set(pipe.experts.matches()["cat"]) == {"unet", "text_encoder", "text_encoder_2"}

    def test_each_tokenizer_finds_the_words_in_the_prompt_that_it_reads(self, pipe: Any) -> None:
        method = Noting()
        pipe.set_composition(method)
        draw(self.case, pipe, "a cat", prompt_2="a dog", regions={"cat": (0, 0, 0.5, 1), "dog": (0.5, 0, 1, 1)})
        called = {
            component: [bool((weights == 1).any()) for weights in noted.unbind(-1)]
            for component in ("text_encoder", "text_encoder_2", "unet")
            for noted in [last_words(method, component)]
        }
        assert called == {"text_encoder": [True, False], "text_encoder_2": [False, True], "unet": [True, True]}
        with pytest.raises(MoLEError, match="lacks the words that call a LoRA: 'dog'"):
            draw(self.case, pipe, "a cat", prompt_2="a cat", regions={"cat": (0, 0, 0.5, 1)})


def last_words(method: Noting, component: str) -> torch.Tensor:
    """What the words of the prompt were weighed by in a component, `(rows, tokens, N)`."""
    noted = [
        weights
        for site, run, weights in method.noted
        if site.component == component and (run.timestep is None or site.reads == "text") and not run.call.prior
        # Negative prompts have nobody's words.
        if (weights == 1).any()
    ]
    return noted[-1]


class TestImg2Img(PipelineContract):
    case = Case(
        MoLEStableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLImg2ImgPipeline,
        sdxl,
        {**GUIDED, "image": PICTURE, "strength": 0.9, "num_inference_steps": 3},
    )


class TestInpaint(PipelineContract):
    case = Case(
        MoLEStableDiffusionXLInpaintPipeline,
        StableDiffusionXLInpaintPipeline,
        sdxl,
        {**GUIDED, "image": PICTURE, "mask_image": MASK, "height": 32, "width": 32},
    )


class TestControlNet(PipelineContract):
    case = Case(
        MoLEStableDiffusionXLControlNetPipeline,
        StableDiffusionXLControlNetPipeline,
        with_controlnet,
        {**GUIDED, "image": PICTURE},
    )


class TestControlNetImg2Img(PipelineContract):
    case = Case(
        MoLEStableDiffusionXLControlNetImg2ImgPipeline,
        StableDiffusionXLControlNetImg2ImgPipeline,
        with_controlnet,
        {**GUIDED, "image": PICTURE, "control_image": PICTURE},
    )


class TestControlNetInpaint(PipelineContract):
    case = Case(
        MoLEStableDiffusionXLControlNetInpaintPipeline,
        StableDiffusionXLControlNetInpaintPipeline,
        with_controlnet,
        {**GUIDED, "image": PICTURE, "mask_image": MASK, "control_image": PICTURE},
    )


def test_the_refiner_is_refused_by_name() -> None:
    parts = {**sdxl(), "text_encoder": None, "tokenizer": None}
    pipe = MoLEStableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)
    with pytest.raises(MoLEError, match="this is the refiner of Stable Diffusion XL"):
        pipe.load_loras({"cat": {"unet.conv_in.lora_A.weight": torch.zeros(1)}})


def test_pipelines_without_text_encoders_draw_from_embeddings() -> None:
    """As where prompts were encoded beforehand, to save memory."""
    parts = {**sdxl(), "text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    pipe = MoLEStableDiffusionXLPipeline(**parts)
    whole = MoLEStableDiffusionXLPipeline(**sdxl())
    state = {key: value for key, value in lora_state(whole, 0).items() if key.startswith("unet.")}
    pipe.load_loras({"cat": state})
    pipe.set_progress_bar_config(disable=True)
    embeds = {"prompt_embeds": torch.randn(1, 16, 48), "pooled_prompt_embeds": torch.randn(1, 16)}
    pipe(**embeds, guidance_scale=1.0, num_inference_steps=1, output_type="latent")
