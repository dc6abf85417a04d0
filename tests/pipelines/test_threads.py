"""Calls of several threads do not meet."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from torch import Tensor

from mole_diffusion.composition import Masks, Switch
from mole_diffusion.pipelines import MoLEStableDiffusionImg2ImgPipeline, MoLEStableDiffusionPipeline
from tests.composing import assert_close, composing_pipeline, draw

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


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
@pytest.mark.parametrize("method", ["linear", Switch(every=1), Masks()])
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
            "a cat and a dog", num_inference_steps=2, output_type="latent", loras=loras, generator=generator
        ).images

    calls = [lambda p=p, c=c, k=k: call(p, c, k) for k, (p, c) in enumerate(zip(pipes, CHOICES, strict=True))]
    in_turn = [one() for one in calls]
    for _ in range(2):
        for drawn, expected in zip(together(calls), in_turn, strict=True):
            assert isinstance(drawn, Tensor), drawn
            assert_close(drawn, expected)
    assert pipe.experts.keep.tolist() == [[1.0, 1.0]]  # nothing stays behind
    assert all(torch.equal(one(), expected) for one, expected in zip(calls, in_turn, strict=True))


def test_a_call_inside_of_a_call_leaves_it_as_it_was() -> None:
    """Guidance and the solver's last steps are noted on pipeline and scheduler, and the inner call has its own."""
    pipe = composing_pipeline("cat", "dog")
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)

    def drawn(loras: list[str], steps: int, guidance: float, **more: Any) -> Tensor:
        settings = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "latent", "loras": loras}
        return pipe("a cat and a dog", generator=torch.Generator().manual_seed(0), **settings, **more).images

    inner: list[Tensor] = []

    def preview(_pipe: Any, _step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        inner.append(drawn(["dog"], 5, 7.0))
        return kwargs

    expected, expected_inside = drawn(["cat"], 4, 3.0), drawn(["dog"], 5, 7.0)
    assert torch.equal(drawn(["cat"], 4, 3.0, callback_on_step_end=preview), expected)
    assert all(torch.equal(one, expected_inside) for one in inner)


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
    pipe.set_composition(Switch(every=2))
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
