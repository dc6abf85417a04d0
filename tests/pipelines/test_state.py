"""What a pipeline lists acts, or an error says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
)
from peft import LoraConfig, get_peft_model

from mole_diffusion import pipelines
from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import AttachError
from mole_diffusion.lora import load_lora
from mole_diffusion.pipelines import MoLEStableDiffusionImg2ImgPipeline, MoLEStableDiffusionPipeline
from tests.composing import PROMPT, assert_close, composing_pipeline, draw, lora_states
from tests.tiny import TEXT_ENCODER, random_lora, tiny_components, tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_experts_somebody_detached_are_attached_again() -> None:
    pipe = composing_pipeline("cat", "dog")
    expected = draw(pipe)
    pipe.experts.detach()
    assert torch.equal(draw(pipe), expected)


def test_a_refused_change_leaves_what_was_loaded() -> None:
    pipe = composing_pipeline("cat")
    expected = draw(pipe)
    pipe.unet.mid_block.compile(backend="eager")  # the whole model takes ten times as long
    with pytest.raises(AttachError, match="is compiled"):
        pipe.load_loras({"dog": lora_states(pipe)["dog"]})
    assert pipe.experts.names == ("cat",)
    assert_close(draw(pipe), expected)


def test_a_compiled_model_is_the_model_that_has_the_loras() -> None:
    pipe = composing_pipeline("cat")
    expected = draw(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with torch.compiler.set_stance("force_eager"):  # the graphs would take half a minute
        assert torch.equal(draw(pipe), expected)
    with pytest.raises(AttachError, match="is compiled"):
        pipe.load_loras({"dog": lora_states(pipe)["dog"]})
    assert pipe.experts.names == ("cat",)
    other = composing_pipeline()
    other.unet = torch.compile(other.unet, backend="eager")
    with pytest.raises(AttachError, match="is compiled"):
        other.load_loras({"cat": lora_states(pipe)["cat"]})


def test_a_model_inside_of_another_is_named_and_no_other_kind_of_model() -> None:
    pipe = composing_pipeline()
    pipe.unet = inside = get_peft_model(pipe.unet, LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(
        MoLEError, match=r"the unet is a UNet2DConditionModel inside of a PeftModel.*pipe\.unet\.unload"
    ):
        pipe.load_loras({"cat": lora_states(tiny_pipeline())["cat"]})
    pipe.unet = inside.unload()
    pipe.load_loras({"cat": lora_states(pipe)["cat"]})
    assert torch.equal(draw(pipe), draw(composing_pipeline("cat")))


@pytest.mark.parametrize(("down", "up", "message"), [(1e4, 1e-9, "is too small for"), (1e-6, 1e6, "too large for the")])
def test_loras_that_a_cast_takes_away_are_missed(down: float, up: float, message: str) -> None:
    """Single precision has room for their factors, and half precision for one of them."""
    pipe = composing_pipeline()
    state = random_lora({"unet": pipe.unet})
    state = {key: value * (up if "lora_B" in key else down) for key, value in state.items()}
    pipe.load_loras({"cat": state})
    lora = load_lora(state, pipe.lora_components)
    expected = draw(pipe)
    pipe.unet.half()
    with pytest.raises(MoLEError, match=rf"the LoRA 'cat' .*{message}"), pipe.composing():
        pass
    with pipe.composing([]):
        pass
    pipe.unet.float()
    assert_close(draw(pipe), expected, atol=0.02)  # the base was rounded
    pipe.unload_loras()
    pipe.unet.half()
    with pytest.raises(MoLEError, match=message):
        pipe.load_loras({"cat": lora})


def test_processors_somebody_kept_act_once_or_not_at_all() -> None:
    pipe, other = composing_pipeline("cat", "dog"), composing_pipeline()
    base, expected = draw(other), draw(pipe)
    kept = dict(pipe.unet.attn_processors)
    pipe.fuse_qkv_projections()
    assert_close(draw(pipe), expected)
    pipe.unfuse_qkv_projections()  # puts those of before back
    assert_close(draw(pipe), expected)
    other.unet.set_attn_processor(dict(kept))  # of another model
    assert torch.equal(draw(other), base)
    other.load_loras({name: lora_states(other)[name] for name in ("cat", "dog")})
    assert_close(draw(other), expected)
    pipe.unload_loras()
    pipe.unet.set_attn_processor(dict(kept))
    assert_close(draw(pipe), base)


def test_a_model_that_was_exchanged_is_noticed() -> None:
    pipe = composing_pipeline("cat")
    pipe.unet = tiny_components(seed=1)["unet"]
    with pytest.raises(ValueError, match=r"loaded into another unet than this pipeline has now.*unload_loras"):
        draw(pipe)
    draw(pipe, loras=[])
    pipe.unload_loras()
    pipe.load_loras({"cat": lora_states(pipe)["cat"]})
    draw(pipe)


def test_models_of_another_pipeline_with_loras_are_not_loaded_into() -> None:
    first = composing_pipeline("cat")
    second = MoLEStableDiffusionPipeline.from_pipe(composing_pipeline(), text_encoder=first.text_encoder)
    second.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="named 'cat' is loaded already"):
        second.load_loras({"cat": lora_states(second)["cat"]})
    with pytest.raises(ValueError, match="another unet than this pipeline has now"):
        draw(second)
    first.unload_loras()
    second.load_loras({"cat": lora_states(second)["cat"]})
    draw(second)


def test_nothing_is_unloaded_while_a_picture_is_drawn() -> None:
    pipe = composing_pipeline("cat", "dog")
    expected = draw(pipe)
    refused: list[str] = []

    def meddle(pipe: Any, *_: Any) -> dict[str, Any]:
        mug = lora_states(pipe)["mug"]
        for change in (
            pipe.unload_loras, pipe.fuse_lora, lambda: pipe.load_loras({"mug": mug}), pipe.disable_lora,
            pipe.enable_lora, pipe.init_gates,
        ):  # fmt: skip
            with pytest.raises(MoLEError, match=r"while a picture is being drawn with cat, dog.*use_loras"):
                change()
            refused.append("yes")
        with pytest.raises(MoLEError, match=r"cannot choose a composition in a call that is running.*use_loras"):
            pipe.set_composition("linear")
        return {}

    assert torch.equal(draw(pipe, callback_on_step_end=meddle), expected)
    assert len(refused) == 12
    pipe.unload_loras()


def test_experts_that_go_in_the_middle_of_a_picture_are_missed() -> None:
    pipe = composing_pipeline("cat", "dog")
    expected = draw(pipe)

    def detach(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe.experts.detach()
        return {}

    with pytest.raises(MoLEError, match=r"LoRAs cat, dog were taken off the models .* while a picture was being drawn"):
        draw(pipe, callback_on_step_end=detach)
    assert torch.equal(draw(pipe), expected)


def test_a_model_that_is_exchanged_in_the_middle_of_a_picture_is_missed() -> None:
    pipe = composing_pipeline("cat")
    other = tiny_pipeline(seed=1).unet

    def exchange(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.unet = other
        return {}

    with pytest.raises(MoLEError, match="the LoRAs cat were loaded into another unet than this pipeline has now"):
        draw(pipe, callback_on_step_end=exchange)
    assert draw(pipe, loras=[], callback_on_step_end=exchange).isfinite().all()


def test_nothing_is_loaded_under_a_pipeline_that_has_none() -> None:
    pipe = composing_pipeline()
    other = MoLEStableDiffusionImg2ImgPipeline.from_pipe(pipe)
    expected = draw(pipe)
    states = lora_states(pipe)

    def meddle(*_: Any) -> dict[str, Any]:
        with pytest.raises(MoLEError, match="cannot load LoRAs while a picture is being drawn with these models"):
            other.load_loras({"cat": states["cat"]})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, callback_on_step_end=meddle)
    other.load_loras({"cat": states["cat"]})  # the call is over, however it ended
    with pipe.composing(), pytest.raises(MoLEError, match="cannot unload LoRAs while a picture is being drawn with c"):
        other.unload_loras()
    other.unload_loras()
    assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("cls", [AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image])
def test_autopipelines_find_ours(cls: Any) -> None:
    pipe = composing_pipeline("cat")
    other = cls.from_pipe(pipe)
    assert type(other).__name__.startswith("MoLEStableDiffusion")
    perturbed = cls.from_pipe(other, enable_pag=True)
    assert type(perturbed) in vars(pipelines.perturbed).values()
    assert type(cls.from_pipe(perturbed, enable_pag=False)) is type(other)
    assert other.experts is perturbed.experts is pipe.experts


def test_a_lora_of_the_text_encoder_alone_does_not_meet_prompt_embeddings() -> None:
    pipe = composing_pipeline()
    text = random_lora({"text_encoder": pipe.text_encoder}, targets=TEXT_ENCODER)
    pipe.load_loras({"words": text, "cat": lora_states(pipe)["cat"]})
    with pipe.composing():
        embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    with pytest.raises(ValueError, match=r"'words' acts on the text encoder alone.*loras=\['cat'\]"):
        draw(pipe, None, **given)
    draw(pipe, None, loras=["cat"], **given)


BLACK: dict[str, dict[str, Any]] = {
    "guidance_scale": {"guidance_scale": float("nan")},
    "guidance_scale`": {"guidance_scale": 1e39},  # infinite in float32
    "eta": {"eta": float("nan")},
    "cross_attention_kwargs": {"cross_attention_kwargs": {"scale": float("inf")}},
    "the scale of 'cat'": {"loras": {"cat": 1e39}},
    "latents": {"latents": torch.full((1, 4, 16, 16), float("nan"))},
    "latents`": {"latents": np.full((1, 4, 16, 16), np.nan)},
    "eta`": {"eta": np.array(np.nan)},
}


@pytest.mark.parametrize("argument", BLACK)
def test_numbers_that_would_draw_a_black_picture_are_refused(argument: str) -> None:
    pipe = composing_pipeline("cat")
    with pytest.raises(ValueError, match=f"`?{argument}.* must be finite"):
        draw(pipe, **BLACK[argument])
    if argument == "guidance_scale":
        with pytest.raises(ValueError, match="`guidance_scale` must be finite"):
            pipe(PROMPT, None, None, 2, None, None, float("nan"))  # not by its name


@pytest.mark.parametrize("number", [float("nan"), -1e30])
def test_gates_that_are_no_numbers_draw_no_black_picture(number: float) -> None:
    pipe = composing_pipeline("cat", "dog")
    gates = pipe.init_gates()
    draw(pipe)
    with torch.no_grad():
        next(iter(gates.gate_parameters())).view(-1)[0] = number
    with pytest.raises(ValueError, match=r"the gates have numbers that are not finite, or huge \(gates\."):
        draw(pipe)
    draw(pipe, loras=[])
