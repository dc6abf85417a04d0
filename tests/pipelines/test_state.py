"""What a pipeline lists acts, or an error says why; and calls of several threads do not meet."""

from __future__ import annotations

import threading
from typing import Any

import diffusers.loaders
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    StableDiffusionPipeline,
)
from peft import LoraConfig
from torch import Tensor
from transformers.integrations import PeftAdapterMixin

from mole_diffusion.composition import Masks
from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import AttachError
from mole_diffusion.pipelines import MoLEStableDiffusionImg2ImgPipeline, MoLEStableDiffusionPipeline
from tests.composing import PROMPT, assert_close, composing_pipeline, draw, lora_states
from tests.tiny import ATTENTION, TEXT_ENCODER, random_lora, tiny_components

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
OURS = r"adapters of `load_lora_weights`, and the LoRAs cat were loaded by `load_loras`: "
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


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
        for change in (pipe.unload_loras, pipe.fuse_lora, lambda: pipe.load_loras({"mug": mug})):
            with pytest.raises(ValueError, match=r"while a picture is being drawn with cat, dog.*use_loras"):
                change()
            refused.append("yes")
        return {}

    assert torch.equal(draw(pipe, callback_on_step_end=meddle), expected)
    assert len(refused) == 6
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
    assert other.experts is pipe.experts


# --- diffusers' own calls ----------------------------------------------------------------------------------------


def test_calls_of_diffusers_do_for_ours_what_their_names_say() -> None:
    pipe, base = composing_pipeline("cat", "dog"), draw(composing_pipeline())
    drawn = draw(pipe)
    pipe.disable_lora()
    assert torch.equal(draw(pipe), base)
    pipe.enable_lora()
    assert torch.equal(draw(pipe), drawn)
    pipe.delete_adapters("dog")
    assert pipe.experts.names == ("cat",)
    pipe.unload_lora_weights()
    assert pipe.experts is None
    assert torch.equal(draw(pipe), base)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("unfuse_lora", []),
        ("set_adapters", [["cat"], [0.3]]),
        ("set_adapters", [[]]),
        ("set_adapters", ["of nobody"]),
        ("delete_adapters", ["of nobody"]),
        ("set_lora_device", [["cat"], "cpu"]),
        ("set_lora_device", ["cat", "cpu"]),
        ("enable_lora_hotswap", []),
    ],
)
def test_calls_that_cannot_mean_ours_name_them(call: str, arguments: list[Any]) -> None:
    pipe = composing_pipeline("cat")
    with pytest.raises(ValueError, match=OURS):
        getattr(pipe, call)(*arguments)


ARGUMENTS: dict[str, list[Any]] = {
    "set_adapters": [["cat"]],
    "set_adapter": ["cat"],
    "delete_adapters": [["cat"]],
    "delete_adapter": ["cat"],
    "save_lora_adapter": ["folder"],
    "load_lora_adapter": [{}, "unet", False],
    "load_adapter": ["folder", "cat"],
    "add_adapter": [LoraConfig(target_modules=["to_q"]), "cat"],
}


def calls_of_models() -> list[tuple[str, str]]:
    """Every call about adapters that a UNet and a text encoder inherit, but the one that lists them."""
    found = []
    for component, mixin in (("unet", diffusers.loaders.PeftAdapterMixin), ("text_encoder", PeftAdapterMixin)):
        names = [name for name, value in vars(mixin).items() if callable(value) and not name.startswith("_")]
        found += [(component, name) for name in names if name != "active_adapters"]
    return found


@pytest.mark.parametrize(("component", "call"), calls_of_models())
def test_calls_of_models_about_adapters_name_ours_and_change_nothing(component: str, call: str) -> None:
    pipe = composing_pipeline("cat")
    drawn = draw(pipe)
    named = {"adapter_name": "cat"} if call == "load_lora_adapter" else {}
    with pytest.raises(ValueError, match=OURS):
        getattr(getattr(pipe, component), call)(*ARGUMENTS.get(call, []), **named)
    assert torch.equal(draw(pipe), drawn)
    assert getattr(pipe, component).active_adapters() == ["cat"]
    pipe.unload_loras()
    assert call not in vars(getattr(pipe, component))


def test_calls_of_a_stock_pipeline_on_our_models_name_ours_too() -> None:
    pipe = composing_pipeline("cat")
    stock = StableDiffusionPipeline.from_pipe(pipe)
    for call, arguments in (("unload_lora_weights", []), ("fuse_lora", []), ("disable_lora", [])):
        with pytest.raises(ValueError, match=OURS):
            getattr(stock, call)(*arguments)
    drawn = draw(stock)
    pipe.disable_lora()
    assert torch.equal(draw(stock), draw(StableDiffusionPipeline(**tiny_components(), **NO_CHECKER)))
    with pipe.composing():
        assert torch.equal(draw(pipe), draw(pipe, loras=[]))
    pipe.enable_lora()
    assert torch.equal(draw(stock), drawn)


def test_disable_lora_is_no_more_once_the_loras_it_was_about_are_gone() -> None:
    pipe = composing_pipeline()
    pipe.disable_lora()
    pipe.load_loras({"cat": lora_states(pipe)["cat"]})
    expected = draw(composing_pipeline("cat"))
    assert torch.equal(draw(pipe), expected)
    pipe.disable_lora()
    pipe.unload_loras()
    pipe.load_loras({"cat": lora_states(pipe)["cat"]})
    assert torch.equal(draw(pipe), expected)


def test_calls_of_models_about_adapters_of_peft_go_on_beside_ours() -> None:
    pipe = composing_pipeline("cat")
    drawn = draw(pipe)
    theirs = random_lora({"unet": pipe.unet}, 3, ATTENTION, seed=8)
    pipe.unet.load_lora_adapter(dict(theirs), prefix="unet", adapter_name="theirs")
    assert pipe.unet.active_adapters() == ["theirs", "cat"]
    beside = draw(pipe)
    pipe.unet.set_adapters("theirs", 0.5)
    assert not torch.equal(draw(pipe), beside)
    for call, arguments in (("disable_lora", []), ("disable_adapters", []), ("set_adapters", [["theirs", "cat"]])):
        with pytest.raises(ValueError, match=OURS):
            getattr(pipe.unet, call)(*arguments)
    with pytest.raises(ValueError, match=OURS):
        pipe.fuse_lora(adapter_names=["theirs", "cat"])
    pipe.unet.delete_adapters("theirs")
    assert_close(draw(pipe), drawn)


def test_fused_loras_draw_as_beside_the_weights_and_leave_them_as_they_were() -> None:
    pipe = composing_pipeline("cat", "mug")
    base = draw(pipe, loras=[])
    with pytest.raises(MoLEError, match=r"cat, mug can be fused only with weights that stay the same.*none is chosen"):
        pipe.fuse_lora()
    pipe.set_composition("linear")
    beside = draw(pipe, loras={"cat": 0.5, "mug": 1.0})
    with pytest.raises(ValueError, match=r"choose and weigh them in each call"):
        pipe.fuse_lora(lora_scale=0.5)
    pipe.fuse_lora()
    assert_close(draw(pipe, loras={"cat": 0.5, "mug": 1.0}), beside)
    assert torch.equal(draw(pipe, loras=[]), base)
    with pytest.raises(
        MoLEError, match=r"cannot choose a composition whose weights change while .* fused.*unfuse_lora"
    ):
        pipe.set_composition("masks")
    with pytest.raises(MoLEError, match=r"cannot choose a composition whose weights change"):
        pipe.init_gates()
    assert pipe.gates is None
    pipe.unload_loras(["mug"])
    assert pipe.experts.merged
    alone = draw(pipe)
    pipe.unfuse_lora()
    assert not pipe.experts.merged
    assert_close(draw(pipe), alone)
    with pytest.raises(ValueError, match=OURS):
        pipe.unfuse_lora()
    pipe.unload_loras()
    assert torch.equal(draw(pipe), base)


def test_lists_of_adapters_have_ours_and_those_of_peft() -> None:
    pipe = composing_pipeline("cat", "mug")
    assert pipe.get_active_adapters() == ["cat", "mug"]
    assert pipe.get_list_adapters() == {"unet": ["cat", "mug"], "text_encoder": ["cat"]}
    theirs = random_lora({"unet": pipe.unet}, 3, ATTENTION, seed=8)
    with pytest.raises(ValueError, match=OURS):
        pipe.load_lora_weights(dict(theirs), adapter_name="cat")
    pipe.load_lora_weights(dict(theirs), adapter_name="theirs")
    assert pipe.get_active_adapters() == ["cat", "mug", "theirs"]
    assert pipe.get_list_adapters() == {"unet": ["theirs", "cat", "mug"], "text_encoder": ["cat"]}
    pipe.set_adapters("theirs", 0.5)  # looks into these lists
    pipe.disable_lora()
    assert pipe.get_active_adapters() == []
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {"unet": ["cat", "mug"], "text_encoder": ["cat"]}


def test_beside_adapters_of_peft() -> None:
    base = composing_pipeline()
    cat, theirs = lora_states(base)["cat"], random_lora({"unet": base.unet}, 3, ATTENTION, seed=8)
    pipe = composing_pipeline()
    pipe.load_lora_weights(dict(theirs), adapter_name="theirs")
    with pytest.raises(AttachError, match=r"carries a PEFT adapter \(theirs, at .*load_lora_weights.*fuse_lora"):
        pipe.load_loras({"cat": cat})
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.load_loras({"cat": cat})

    both = composing_pipeline()
    both.load_loras({"cat": cat, "theirs": theirs})
    both.set_composition("linear")
    assert_close(draw(pipe), draw(both), atol=2e-4)

    ours = composing_pipeline("cat")
    alone = draw(ours)
    ours.load_lora_weights(dict(theirs), adapter_name="theirs")
    assert_close(draw(ours), draw(both), atol=2e-4)
    with pytest.raises(ValueError, match=r"`loras=\[\]` is the bare base model, and the adapters theirs of"):
        draw(ours, loras=[])
    ours.unload_lora_weights()  # diffusers puts new modules in the place of those our hooks were on
    assert_close(draw(ours), alone)
    ours.unload_loras()
    assert_close(draw(ours), draw(composing_pipeline()))


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
}


@pytest.mark.parametrize("argument", BLACK)
def test_numbers_that_would_draw_a_black_picture_are_refused(argument: str) -> None:
    pipe = composing_pipeline("cat")
    with pytest.raises(ValueError, match=f"`?{argument}.* must be finite"):
        draw(pipe, **BLACK[argument])
    if argument == "guidance_scale":
        with pytest.raises(ValueError, match="`guidance_scale` must be finite"):
            pipe(PROMPT, None, None, 2, None, None, float("nan"))  # not by its name


def test_gates_that_are_no_numbers_draw_no_black_picture() -> None:
    pipe = composing_pipeline("cat", "dog")
    gates = pipe.init_gates()
    draw(pipe)
    with torch.no_grad():
        next(iter(gates.gate_parameters())).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=r"the gates have numbers that are not finite \(gates\."):
        draw(pipe)
    draw(pipe, loras=[])


# --- threads --------------------------------------------------------------------------------------------------------


def together(calls: list[Any]) -> list[Tensor]:
    """The results of calls made at once, in threads of their own."""
    results: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def work(index: int) -> None:
        barrier.wait()
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


CHOICES: list[Any] = [["cat"], {"dog": 0.5}, [], ["cat", "dog"]]


@pytest.mark.parametrize("sharing", ["one pipeline", "models", "scheduler"])
@pytest.mark.parametrize("method", ["linear", "switch", Masks()])
def test_calls_at_once_are_as_calls_in_turn(sharing: str, method: Any) -> None:
    pipe = composing_pipeline("cat", "dog")
    pipe.set_composition(method)
    pipes = [pipe] * len(CHOICES)
    if sharing != "one pipeline":
        pipes = [MoLEStableDiffusionPipeline(**pipe.components, requires_safety_checker=False) for _ in CHOICES]
        for other in pipes:
            other.set_progress_bar_config(disable=True)
            if sharing == "models":
                other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)

    def call(pipe: Any, loras: Any, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipe(
            "a cat and a dog", num_inference_steps=4, output_type="latent", loras=loras, generator=generator
        ).images

    calls = [lambda p=p, c=c, k=k: call(p, c, k) for k, (p, c) in enumerate(zip(pipes, CHOICES, strict=True))]
    in_turn = [one() for one in calls]
    for _ in range(2):
        for drawn, expected in zip(together(calls), in_turn, strict=True):
            assert isinstance(drawn, Tensor), drawn
            assert_close(drawn, expected)
    assert pipe.experts.keep.tolist() == [[1.0, 1.0]]  # nothing stays behind
    assert all(torch.equal(one(), expected) for one, expected in zip(calls, in_turn, strict=True))


def test_two_tasks_of_one_model_draw_at_once() -> None:
    pipe = composing_pipeline("cat", "dog")
    other = MoLEStableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 32, 32)

    def image_to_image() -> Tensor:
        return draw(other, image=picture, strength=0.9, loras=["dog"], generator=torch.Generator().manual_seed(1))

    def text_to_image() -> Tensor:
        return draw(pipe, loras=["cat"], generator=torch.Generator().manual_seed(2))

    expected = [image_to_image(), text_to_image()]
    for drawn, known in zip(together([image_to_image, text_to_image]), expected, strict=True):
        assert isinstance(drawn, Tensor), drawn
        assert_close(drawn, known)


def test_a_stock_pipeline_with_a_scheduler_of_its_own_is_told_how() -> None:
    pipe = composing_pipeline("cat", "dog")
    pipe.set_composition("switch")
    stock = StableDiffusionPipeline(
        **{**pipe.components, "scheduler": type(pipe.scheduler)()}, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    pipe.scheduler.set_timesteps(7)
    with pipe.composing(), pytest.raises(ValueError, match=r"composing\(scheduler=its\.scheduler\)"):
        draw(stock, num_inference_steps=5)
    with pipe.composing(scheduler=stock.scheduler):
        drawn = draw(stock, num_inference_steps=5)
    assert drawn.isfinite().all()
