"""Modules whose work nobody takes: a family knows them as gradients do, and a LoRA on these alone is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mole_diffusion import pipelines
from mole_diffusion.errors import MoLEError
from mole_diffusion.lora import LoRAError, load_lora
from mole_diffusion.lora.modules import ModuleIndex
from tests.tiny import families, tiny_pipeline
from tests.tiny.dits import tiny_parts

XL = pipelines.MoLEStableDiffusionXLPipeline
PIPES: dict[str, Callable[[], Any]] = {
    "stable-diffusion": lambda: tiny_pipeline(pipelines.MoLEStableDiffusionPipeline),
    "stable-diffusion-xl": lambda: XL(**families.sdxl()),
    "stable-diffusion-3": lambda: pipelines.MoLEStableDiffusion3Pipeline(**families.sd3()),
    "flux": lambda: pipelines.MoLEFluxPipeline(**tiny_parts("flux")),
    "flux2": lambda: pipelines.MoLEFlux2Pipeline(**tiny_parts("flux2")),
    "z_image": lambda: pipelines.MoLEZImagePipeline(**tiny_parts("z_image")),
    "qwen_image": lambda: pipelines.MoLEQwenImagePipeline(**tiny_parts("qwen_image")),
    "krea2": lambda: pipelines.MoLEKrea2Pipeline(**tiny_parts("krea2")),
}
LAST = "text_encoder.encoder.layers.1"
"""The last layer of the small text encoders."""


def pair(pipe: Any, *names: str) -> dict[str, Tensor]:
    """A LoRA on these modules, named with their components."""
    state, generator = {}, torch.Generator().manual_seed(0)
    for name in names:
        component, _, module = name.partition(".")
        rows, columns = getattr(pipe, component).get_submodule(module).weight.shape
        state[f"{name}.lora_A.weight"] = torch.randn(1, columns, generator=generator)
        state[f"{name}.lora_B.weight"] = torch.randn(rows, 1, generator=generator)
    return state


@pytest.mark.parametrize("family", PIPES)
def test_what_a_family_says_nobody_reads_has_no_gradient_and_all_else_has(family: str) -> None:
    pipe = PIPES[family]()
    models, known = pipe.lora_components, pipe.family
    torch.manual_seed(0)
    for model in models.values():
        for parameter in model.requires_grad_(True).parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)  # some are zero at the start
    shape = (
        (known.latent_shape(pipe)[0], 8, 8) if family == "z_image" else known.latent_shape(pipe)
    )  # its rope is short
    latents = torch.randn(1, *shape)
    prediction = known.predict(pipe, latents, torch.tensor([500.0]), known.conditions(pipe, ["a cat"]))
    prediction.square().sum().backward()
    for component, model in models.items():
        for name in ModuleIndex(model).shapes:
            gradient = model.get_submodule(name).weight.grad
            read = gradient is not None and bool(gradient.any())
            assert known.is_read(models, component, name) is read, f"{component}.{name}"


UNREAD = {
    "stable-diffusion-xl": [f"{LAST}.mlp.fc1", f"{LAST}.self_attn.k_proj"],
    "stable-diffusion-3": ["transformer.transformer_blocks.1.attn.add_q_proj"],
    "qwen_image": [f"transformer.transformer_blocks.1.{n}" for n in ("attn.to_add_out", "txt_mlp.net.2")],
}


@pytest.mark.parametrize("family", UNREAD)
def test_a_lora_on_these_alone_is_refused(family: str) -> None:
    pipe = PIPES[family]()
    state = pair(pipe, *UNREAD[family])
    with pytest.raises(
        LoRAError, match=r"no picture depends on the modules that it changes, so it would do nothing: '"
    ):
        pipe.load_loras({"cat": state})
    assert pipe.experts is None
    component = next(iter(pipe.lora_components))
    beside = next(name for name in ModuleIndex(getattr(pipe, component)).shapes if name.endswith("to_q"))
    pipe.load_loras({"cat": {**state, **pair(pipe, f"{component}.{beside}")}})


def test_a_lora_that_was_read_where_nobody_knew_the_pipeline_is_refused_too() -> None:
    pipe = XL(**families.sdxl())
    lora = load_lora(pair(pipe, *UNREAD["stable-diffusion-xl"]), {"text_encoder": pipe.text_encoder})
    with pytest.raises(MoLEError, match="the LoRA 'cat' would do nothing: no picture depends on"):
        pipe.load_loras({"cat": lora})


def test_factors_that_are_zero_where_they_are_read_change_nothing() -> None:
    pipe = PIPES["qwen_image"]()
    state = pair(pipe, *UNREAD["qwen_image"], "transformer.transformer_blocks.0.attn.to_q")
    state["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"] *= 0
    with pytest.raises(LoRAError, match="the products of its factors are zero"):
        pipe.load_loras({"cat": state})


def encoded(pipe: Any, **given: Any) -> Any:
    """Prompt embeddings with the LoRA, and what they are without."""
    found = []
    for loras in (None, []):
        with pipe.composing(loras), torch.no_grad():
            found.append(torch.cat([one.flatten() for one in pipe.encode_prompt("a cat", **given) if one is not None]))
    return found


def test_layers_that_a_call_skips_are_not_read_in_it() -> None:
    pipe = XL(**families.sdxl())
    pipe.load_loras({"cat": pair(pipe, "text_encoder.encoder.layers.0.mlp.fc1")})
    pipe.set_composition("linear")
    whole, base = encoded(pipe, num_images_per_prompt=1, device="cpu", do_classifier_free_guidance=False)
    assert not torch.equal(whole, base)
    given = {"num_images_per_prompt": 1, "device": "cpu", "clip_skip": 1}
    with pytest.raises(MoLEError, match=r"'cat' acts on text_encoder\.encoder\.layers\.0\.mlp\.fc1 and the like alone"):
        encoded(pipe, do_classifier_free_guidance=False, **given)
    pipe.register_to_config(force_zeros_for_empty_prompt=True)
    with pytest.raises(MoLEError, match="Skip fewer layers, or leave the LoRA out"):
        pipe("a cat", clip_skip=1, num_inference_steps=1, output_type="latent", height=32, width=32)
    negative, base = encoded(pipe, do_classifier_free_guidance=True, negative_prompt="a dog", **given)
    assert not torch.equal(negative, base)  # of a negative prompt no layer is skipped


@pytest.mark.parametrize("skip", [0, 1])
def test_stable_diffusion_takes_the_layer_before_those_that_are_skipped(skip: int) -> None:
    pipe = PIPES["stable-diffusion"]()
    pipe.load_loras({"cat": pair(pipe, "text_encoder.encoder.layers.0.mlp.fc1")})
    pipe.set_composition("linear")
    given = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    got, _ = encoded(pipe, clip_skip=skip, **given)
    clip = pipe.text_encoder
    tokens = pipe.tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    with pipe.composing(), torch.no_grad():
        layers = clip(tokens, output_hidden_states=True).hidden_states
        assert torch.equal(got, clip.final_layer_norm(layers[-1 - skip]).flatten())
    assert not hasattr(clip, "text_model")


@pytest.mark.parametrize("skip", [-1, 3, 1.5, True, "1"])
@pytest.mark.parametrize("family", ["stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3"])
def test_layers_are_skipped_by_their_number(family: str, skip: Any) -> None:
    pipe = PIPES[family]()
    names = {name: "a cat" for name in ("prompt_2", "prompt_3") if family == "stable-diffusion-3"}
    with pipe.composing(), pytest.raises(MoLEError, match=r"`clip_skip` is how many .* a whole number from 0 to [12]"):
        pipe.encode_prompt("a cat", **names, clip_skip=skip)


def test_a_summary_that_is_given_is_not_read() -> None:
    pipe = XL(**families.sdxl())
    pipe.load_loras({"cat": pair(pipe, "text_encoder_2.text_model.encoder.layers.1.mlp.fc1")})
    pipe.set_composition("linear")
    given = {"num_images_per_prompt": 1, "device": "cpu", "do_classifier_free_guidance": False}
    whole, base = encoded(pipe, **given)
    assert not torch.equal(whole, base)
    with pytest.raises(MoLEError, match="this call takes nothing of that from the text encoder"):
        encoded(pipe, pooled_prompt_embeds=torch.zeros(1, 32), **given)
