"""A composing pipeline is a diffusers pipeline: arguments, outputs, saving, precision, schedulers."""

from __future__ import annotations

import inspect
import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from mole_diffusion.files import NotWrittenError
from mole_diffusion.pipelines import MoLEPipelineMixin, MoLEStableDiffusionPipeline
from tests.composing import NAMES, PROMPT, assert_close, composing_pipeline, draw, lora_states
from tests.merging import merge_state
from tests.test_files import forked
from tests.tiny import tiny_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
# In one order everywhere: processes that share the tests must agree on it, and diffusers gives a set.
SCHEDULERS = sorted(
    (scheduler for scheduler in DDIMScheduler().compatibles if not scheduler.__module__.endswith("objects")),
    key=lambda scheduler: scheduler.__name__,
)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return composing_pipeline(*NAMES)


def test_without_loras_it_draws_what_the_stock_pipeline_draws() -> None:
    assert torch.equal(draw(composing_pipeline()), draw(tiny_pipeline()))


def test_encode_prompt_has_the_stock_signature_and_needs_text_encoders_alone(components: dict[str, Any]) -> None:
    assert inspect.signature(MoLEStableDiffusionPipeline.encode_prompt) == inspect.signature(
        StableDiffusionPipeline.encode_prompt
    )
    alone: Any = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    alone |= {"text_encoder": components["text_encoder"], "tokenizer": components["tokenizer"]}
    encoded = [
        cls(**alone, requires_safety_checker=False).encode_prompt("a cat", "cpu", 1, True, "a dog")
        for cls in (MoLEStableDiffusionPipeline, StableDiffusionPipeline)
    ]
    for ours, stock in zip(*encoded, strict=True):
        assert torch.equal(ours, stock)


def test_the_signature_is_the_stock_one_and_loras() -> None:
    ours = inspect.signature(MoLEStableDiffusionPipeline.__call__).parameters
    stock = inspect.signature(StableDiffusionPipeline.__call__).parameters
    own = ("loras", "regions", "spans")
    assert [name for name in ours if name not in own] == list(stock)
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in own)
    assert ours["guidance_scale"].default == 7.5
    assert "bare base model" in (MoLEStableDiffusionPipeline.__call__.__doc__ or "")


def test_a_pipeline_needs_one_line() -> None:
    class Img2Img(MoLEPipelineMixin, StableDiffusionImg2ImgPipeline):
        pass

    pipe = composing_pipeline("cat", cls=Img2Img)
    image = Image.new("RGB", (32, 32), "red")
    options: dict[str, Any] = {"image": image, "strength": 1.0}
    assert not torch.equal(draw(pipe, **options), draw(pipe, loras=[], **options))
    assert list(inspect.signature(Img2Img.__call__).parameters)[1:3] == ["prompt", "image"]


def test_a_mixin_in_the_wrong_place_is_refused() -> None:
    with pytest.raises(TypeError, match=r"write `class Alone\(MoLEPipelineMixin"):

        class Alone(MoLEPipelineMixin):
            pass


def test_tuple_equals_dict(pipe: Any) -> None:
    assert torch.equal(
        pipe(PROMPT, num_inference_steps=2, output_type="latent", generator=torch.manual_seed(0), return_dict=False)[0],
        draw(pipe),
    )


def test_a_batch_equals_its_rows(pipe: Any) -> None:
    prompts, seeds = ["a cat", "a red dog"], [3, 4]

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = draw(pipe, prompts, generator=generators(), negative_prompt=["grass", "sand"], num_inference_steps=2)
    for row, (prompt, negative) in enumerate([("a cat", "grass"), ("a red dog", "sand")]):
        single = draw(pipe, prompt, generator=generators()[row], negative_prompt=negative)
        assert_close(both[row], single[0])


def test_several_images_of_a_prompt(pipe: Any) -> None:
    images = draw(pipe, ["a cat", "a dog"], num_images_per_prompt=2, loras=["cat", "mug"])
    assert images.shape == (4, 4, 16, 16)
    assert not torch.equal(images[0], images[1])


def test_the_same_seed_draws_the_same(pipe: Any) -> None:
    assert torch.equal(draw(pipe, seed=5), draw(pipe, seed=5))
    assert not torch.equal(draw(pipe, seed=5), draw(pipe, seed=6))


def test_without_guidance(pipe: Any) -> None:
    merged = composing_pipeline()
    merge_state(merged, lora_states(merged)["cat"])
    assert_close(draw(pipe, loras=["cat"], guidance_scale=1.0), draw(merged, guidance_scale=1.0))


def test_given_embeddings_need_no_text_encoder(pipe: Any) -> None:
    with pipe.composing(["cat"]):
        positive, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    drawn = draw(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative, loras=["cat"])
    assert torch.equal(drawn, draw(pipe, loras=["cat"]))


def test_output_types(pipe: Any) -> None:
    (picture,) = draw(pipe, output_type="pil")
    array = draw(pipe, output_type="np")
    assert isinstance(picture, Image.Image)
    assert picture.size == (32, 32)
    assert isinstance(array, np.ndarray)
    assert array.shape == (1, 32, 32, 3)


def test_callbacks_get_what_they_ask_for(pipe: Any) -> None:
    calls: list[tuple[int, list[str]]] = []

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        calls.append((step, sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    wanted = ["latents", "prompt_embeds"]
    drawn = draw(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=wanted)
    assert calls == [(0, wanted), (1, wanted)]
    assert not drawn.any()


def test_the_progress_bar_stays(pipe: Any, capfd: pytest.CaptureFixture[str]) -> None:
    pipe.set_progress_bar_config(disable=False)
    draw(pipe)
    pipe.set_progress_bar_config(disable=True)
    assert "2/2" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers under NumPy 2
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: scheduler.__name__)
def test_every_scheduler(pipe: Any, scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = composing_pipeline()
    merge_state(merged, lora_states(merged)["cat"])
    settings = {**merged.scheduler.config, "skip_prk_steps": True}  # as Stable Diffusion's own PNDM has it
    monkeypatch.setattr(pipe, "scheduler", scheduler.from_config(settings))
    merged.scheduler = scheduler.from_config(settings)
    drawn = draw(pipe, loras=["cat"], num_inference_steps=3)
    assert drawn.isfinite().all()
    expected = draw(merged, num_inference_steps=3)
    assert_close(drawn / expected.abs().max(), expected / expected.abs().max())


def test_there_are_schedulers_to_try() -> None:
    assert len(SCHEDULERS) >= 12


def test_saved_with_loras_attached_it_is_a_stock_folder(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    base = draw(pipe, loras=[])
    for reader in (DiffusionPipeline, StableDiffusionPipeline, MoLEStableDiffusionPipeline):
        reloaded = reader.from_pretrained(tmp_path)
        reloaded.set_progress_bar_config(disable=True)
        assert type(reloaded) is (StableDiffusionPipeline if reader is DiffusionPipeline else reader)
        assert torch.equal(draw(reloaded), base)
    reloaded.load_loras(lora_states(reloaded))
    assert torch.equal(draw(reloaded), draw(pipe))


def test_a_save_that_breaks_off_leaves_what_was_there(tmp_path: Path) -> None:
    tiny_pipeline(MoLEStableDiffusionPipeline).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = tiny_pipeline(MoLEStableDiffusionPipeline, seed=1)

    def on_a_full_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # enough for the VAE, and not for the UNet
        with pytest.raises(NotWrittenError, match="cannot be written"):
            other.save_pretrained(tmp_path)

    def killed() -> None:
        other.scheduler.save_pretrained = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        other.save_pretrained(tmp_path)

    assert forked(on_a_full_disk) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert forked(killed) == -signal.SIGKILL
    assert {path: path.read_bytes() for path in before} == before
    other.save_pretrained(tmp_path)
    now = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert now.keys() == before.keys()
    assert now[tmp_path / "README.md"] == b"mine"
    assert now[tmp_path / "unet" / WEIGHTS] != before[tmp_path / "unet" / WEIGHTS]


def test_weights_of_an_earlier_save_are_not_read_instead(tmp_path: Path) -> None:
    first, second = tiny_pipeline(MoLEStableDiffusionPipeline), tiny_pipeline(MoLEStableDiffusionPipeline, seed=1)
    first.save_pretrained(tmp_path, max_shard_size="200KB")
    first.save_pretrained(tmp_path, variant="fp16")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 2
    second.save_pretrained(tmp_path)
    for variant, saved in ((None, second), ("fp16", first)):
        opened = MoLEStableDiffusionPipeline.from_pretrained(tmp_path, variant=variant)
        for name in ("unet", "text_encoder"):
            expected = getattr(saved, name).state_dict()
            assert all(torch.equal(value, expected[key]) for key, value in getattr(opened, name).state_dict().items())


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.25), (torch.float16, 0.05)])
@pytest.mark.usefixtures("same_noise_in_half_precision")
def test_half_precision_keeps_what_the_loras_do(dtype: torch.dtype, share: float) -> None:
    pipe = composing_pipeline(*NAMES)

    def effect() -> torch.Tensor:
        return draw(pipe, guidance_scale=1.0).float() - draw(pipe, loras=[], guidance_scale=1.0).float()

    expected = effect()
    pipe.to(dtype=dtype)
    assert draw(pipe).dtype == dtype
    assert (effect() - expected).norm() < share * expected.norm()


def test_from_pretrained_takes_a_dtype(tmp_path: Path) -> None:
    composing_pipeline().save_pretrained(tmp_path)
    half = MoLEStableDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.load_loras(lora_states(half))
    assert half.dtype == torch.bfloat16
    assert draw(half).dtype == torch.bfloat16


def test_a_stock_pipeline_from_this_one_goes_on_composing() -> None:
    pipe = composing_pipeline(*NAMES)
    stock = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    stock.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"image": Image.new("RGB", (32, 32), "red"), "strength": 1.0}
    everything = draw(stock, **options)
    with pipe.composing(["cat"]):
        cat = draw(stock, **options)
    with pipe.composing([]):
        base = draw(stock, **options)
    pipe.unload_loras()
    assert torch.equal(draw(stock, **options), base)
    assert not torch.allclose(everything, base, atol=0.05)
    assert not torch.allclose(everything, cat, atol=0.05)


def test_from_pipe_of_a_composing_pipeline_shares_its_loras() -> None:
    class Img2Img(MoLEPipelineMixin, StableDiffusionImg2ImgPipeline):
        pass

    pipe = composing_pipeline("cat", "dog")
    other = Img2Img.from_pipe(pipe)
    assert other.experts is pipe.experts
    other.unload_loras()
    assert pipe.experts is None
    assert torch.equal(draw(pipe), draw(composing_pipeline()))


def test_from_pipe_with_another_unet_refuses_loras_that_would_act_in_half() -> None:
    pipe = composing_pipeline("cat")
    base = draw(composing_pipeline())
    other = MoLEStableDiffusionPipeline.from_pipe(pipe, unet=composing_pipeline().unet)
    with pytest.raises(ValueError, match=r"LoRAs cat were loaded into another unet than this pipeline has now"):
        draw(other)
    assert torch.equal(draw(other, loras=[]), base)  # also the text encoder, which both share
    pipe.unload_loras()
    assert torch.equal(draw(other), base)
    other.load_loras({"cat": lora_states(other)["cat"]})
    assert not torch.equal(draw(other), base)


def test_a_second_pipeline_of_the_same_models_finds_their_loras() -> None:
    pipe = composing_pipeline("cat", "dog")
    base = draw(composing_pipeline())
    other = MoLEStableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    assert other.experts is pipe.experts
    assert torch.equal(draw(other, loras=[]), base)
    assert torch.equal(draw(other, loras=["cat"]), draw(pipe, loras=["cat"]))
    with pytest.raises(ValueError, match="named 'cat' is loaded already"):
        other.load_loras({"cat": lora_states(other)["cat"]})
    other.unload_loras()
    assert pipe.experts is None
    assert torch.equal(draw(pipe), base)


@pytest.mark.parametrize("half", ["vae", "unet"])
def test_from_pipe_keeps_every_precision(half: str) -> None:
    stock = tiny_pipeline()
    getattr(stock, half).to(torch.bfloat16)
    models = {name: getattr(stock, name) for name in ("vae", "text_encoder", "unet")}
    before = {name: {key: value.clone() for key, value in model.state_dict().items()} for name, model in models.items()}
    ours = MoLEStableDiffusionPipeline.from_pipe(stock)
    for name, model in models.items():
        assert getattr(ours, name) is model
        assert model.dtype == (torch.bfloat16 if name == half else torch.float32)
        assert all(torch.equal(value, before[name][key]) for key, value in model.state_dict().items())


def test_from_pipe_casts_when_told() -> None:
    assert MoLEStableDiffusionPipeline.from_pipe(tiny_pipeline(), dtype=torch.float16).unet.dtype == torch.float16
