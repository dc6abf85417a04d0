"""Which LoRAs draw: all, some, scaled, none; and what is said to a call that names them wrongly."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from mole_diffusion.errors import MoLEError
from tests.composing import NAMES, PROMPT, assert_close, composing_pipeline, draw, lora_states
from tests.merging import merge_state


@pytest.fixture(scope="module")
def pipe() -> Any:
    return composing_pipeline(*NAMES)


@pytest.fixture(autouse=True)
def _as_loaded(pipe: Any) -> None:
    pipe.set_composition("normalized")


def test_no_lora_is_the_base_bit_for_bit(pipe: Any) -> None:
    base = draw(composing_pipeline())
    assert torch.equal(draw(pipe, loras=[]), base)
    assert torch.equal(draw(pipe, loras={}), base)
    assert not torch.allclose(draw(pipe), base, atol=0.05)


@pytest.mark.parametrize("method", ["linear", "normalized"])
@pytest.mark.parametrize("kept", [["cat"], ["dog", "mug"]])
def test_a_masked_lora_is_as_if_it_had_not_been_loaded(pipe: Any, method: str, kept: list[str]) -> None:
    pipe.set_composition(method)
    fewer = composing_pipeline(*kept)
    fewer.set_composition(method)
    assert_close(draw(pipe, loras=kept), draw(fewer))


def test_none_means_all_and_the_order_of_names_means_nothing(pipe: Any) -> None:
    assert torch.equal(draw(pipe), draw(pipe, loras=["mug", "cat", "dog"]))


def test_a_dict_keeps_and_scales(pipe: Any) -> None:
    pipe.set_composition("linear")
    merged = composing_pipeline()
    states = lora_states(merged)
    merge_state(merged, states["cat"], 0.8)
    merge_state(merged, states["mug"], -0.5)
    assert_close(draw(pipe, loras={"cat": 0.8, "mug": -0.5}), draw(merged))


def test_a_plain_sum_equals_merged_weights(pipe: Any) -> None:
    pipe.set_composition("linear")
    merged = composing_pipeline()
    for state in lora_states(merged).values():
        merge_state(merged, state)
    assert_close(draw(pipe), draw(merged))


def test_a_normalised_sum_equals_averaged_weights(pipe: Any) -> None:
    merged = composing_pipeline()
    for state in lora_states(merged).values():
        merge_state(merged, state, 1 / 3)
    assert_close(draw(pipe), draw(merged))


def test_text_encoders_read_the_prompt_with_the_same_choice(pipe: Any) -> None:
    def read(loras: Any) -> torch.Tensor:
        with pipe.composing(loras):
            return pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]

    merged = composing_pipeline()
    base = merged.encode_prompt(PROMPT, "cpu", 1, False)[0]
    merge_state(merged, lora_states(merged)["cat"])
    assert torch.equal(read([]), base)
    assert torch.equal(read(["mug"]), base)  # has nothing for the text encoder
    assert_close(read(["cat"]), merged.encode_prompt(PROMPT, "cpu", 1, False)[0])
    assert not torch.allclose(read(["cat"]), base, atol=0.05)


@pytest.mark.parametrize("weight", [0, -0.0, 1e-60])
def test_a_weight_that_is_nothing_is_left_out(pipe: Any, weight: float) -> None:
    assert torch.equal(draw(pipe, loras={"cat": 1.0, "dog": weight}), draw(pipe, loras=["cat"]))


def test_cross_attention_scale_scales_as_in_diffusers(pipe: Any) -> None:
    assert torch.equal(draw(pipe, loras=["cat"], cross_attention_kwargs={"scale": 0.5}), draw(pipe, loras={"cat": 0.5}))
    assert torch.equal(draw(pipe, cross_attention_kwargs={"scale": None}), draw(pipe))
    with pytest.raises(TypeError, match=r"`cross_attention_kwargs\['scale'\]` must be a number, got 'half' \(str\)"):
        draw(pipe, cross_attention_kwargs={"scale": "half"})


def test_a_callback_may_change_the_choice_between_steps(pipe: Any) -> None:
    with pipe.composing([]):
        prompt_embeds, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    latents: list[torch.Tensor] = []

    def drop_all(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"])
        pipe.use_loras([])
        return {}

    drawn = draw(pipe, None, prompt_embeds=prompt_embeds, guidance_scale=1.0, callback_on_step_end=drop_all)
    timestep = pipe.scheduler.timesteps[1]
    base = composing_pipeline()
    with torch.no_grad():
        noise = base.unet(latents[0], timestep, prompt_embeds).sample
    assert torch.equal(drawn, pipe.scheduler.step(noise, timestep, latents[0]).prev_sample)
    assert pipe.experts.keep.tolist() == [[1, 1, 1]]


def test_the_choice_ends_with_the_call_even_by_an_error(pipe: Any) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        draw(pipe, loras={"cat": 2.0}, callback_on_step_end=fail)
    assert pipe.experts.keep.tolist() == [[1, 1, 1]]
    assert pipe.experts.scale.tolist() == [[1, 1, 1]]
    with pytest.raises(RuntimeError, match="`use_loras` changes the LoRAs of a running call"):
        pipe.use_loras(["cat"])


def test_composing_nests_and_reaches_direct_calls_of_the_models(pipe: Any) -> None:
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 32)

    def noise() -> torch.Tensor:
        with torch.no_grad():
            return pipe.unet(sample, 10, text).sample

    with pipe.composing([]):
        base = noise()
        with pipe.composing(["cat"]):
            cat = noise()
        assert torch.equal(noise(), base)
    assert not torch.equal(cat, base)
    assert not torch.equal(cat, noise())


class Drawn:
    """Latents of one pass of the denoiser, with the LoRAs chosen around it and with some chosen here."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.inputs = torch.randn(1, 4, 16, 16), 10, torch.randn(1, 5, 32)
        self.everything = self()

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        return self.pipe.unet(*self.inputs).sample

    def alone(self, name: str) -> torch.Tensor:
        with self.pipe.composing([name]):
            return self()

    def by(self, name: str, times: int = 2) -> Iterator[torch.Tensor]:
        with self.pipe.composing([name]):
            for _ in range(times):
                yield self()

    async def slowly_by(self, name: str) -> AsyncIterator[torch.Tensor]:
        with self.pipe.composing([name]):
            for _ in range(2):
                await asyncio.sleep(0)
                yield self()

    @contextlib.contextmanager
    def around(self, name: str) -> Iterator[None]:
        with self.pipe.composing([name]):
            yield


@pytest.fixture
def drawn(pipe: Any) -> Drawn:
    return Drawn(pipe)


@pytest.fixture
def composed(pipe: Any) -> Iterator[Drawn]:
    drawn = Drawn(pipe)
    with pipe.composing(["cat"]):
        yield drawn


def test_generators_that_take_turns_draw_with_their_own_choice(drawn: Drawn) -> None:
    cat, dog = drawn.alone("cat"), drawn.alone("dog")
    for one, other in zip(drawn.by("cat"), drawn.by("dog"), strict=True):
        assert torch.equal(one, cat)
        assert torch.equal(other, dog)

    async def in_threads(name: str) -> AsyncIterator[torch.Tensor]:
        with drawn.pipe.composing([name]):
            for pause in (0.0, 0.05):  # until the generator waits
                yield await asyncio.to_thread(lambda pause=pause: (time.sleep(pause), drawn())[1])

    async def both(by: Callable[[str], AsyncIterator[torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        dogs = by("dog")
        return [(one, await anext(dogs)) async for one in by("cat")]

    for by in (drawn.slowly_by, in_threads):
        for one, other in asyncio.run(both(by)):
            assert torch.equal(one, cat)
            assert torch.equal(other, dog)

    elsewhere = drawn.by("cat", times=3)  # as servers run them: every step in a thread of its own
    for _ in range(3):
        with ThreadPoolExecutor(1) as threads:
            assert torch.equal(threads.submit(next, elsewhere).result(), cat)
    assert list(elsewhere) == []

    def nested() -> Iterator[torch.Tensor]:
        with drawn.pipe.composing(["dog"]):
            for one in drawn.by("cat"):
                assert torch.equal(one, cat)
                with drawn.around("cat"):
                    assert torch.equal(drawn(), cat)
                yield drawn()

    with drawn.pipe.composing([]):
        assert all(torch.equal(one, dog) for one in nested())
    assert torch.equal(drawn(), drawn.everything)


def test_what_runs_beside_a_generator_that_waits_chooses_for_itself(drawn: Drawn) -> None:
    waiting = drawn.by("cat")
    next(waiting)
    for wish in (drawn, lambda: drawn.pipe.use_loras(["dog"])):
        with pytest.raises(MoLEError, match=r"open in the generator by \(test_masks\.py, line \d+\), which waits"):
            wish()
    with drawn.pipe.composing():
        assert torch.equal(drawn(), drawn.everything)
    assert draw(drawn.pipe).isfinite().all()
    waiting.close()
    assert torch.equal(drawn(), drawn.everything)


def test_generators_that_stand_for_a_block_choose_for_what_is_inside(drawn: Drawn, composed: Drawn) -> None:
    assert torch.equal(composed(), composed.alone("cat"))
    wrapped = contextlib.contextmanager(torch.no_grad()(drawn.around.__wrapped__))
    for around in (drawn.around, functools.partial(wrapped, drawn)):
        with around("dog"):
            assert torch.equal(drawn(), drawn.alone("dog"))

    async def inside() -> torch.Tensor:
        @contextlib.asynccontextmanager
        async def around() -> AsyncIterator[None]:
            with drawn.pipe.composing(["dog"]):
                yield

        async with around():
            return await asyncio.to_thread(drawn)

    assert torch.equal(asyncio.run(inside()), drawn.alone("dog"))


def test_composing_ends_in_any_order(drawn: Drawn) -> None:
    thrown_away = drawn.by("cat")
    next(thrown_away)
    with drawn.pipe.composing(["dog"]):
        del thrown_away
        gc.collect()
        assert torch.equal(drawn(), drawn.alone("dog"))
    assert torch.equal(drawn(), drawn.everything)

    first, second = drawn.pipe.composing(["cat"]), drawn.pipe.composing(["dog"])
    first.__enter__(), second.__enter__()
    with pytest.raises(MoLEError, match=r"ends inside of another one that began later.*`pipe\(\.\.\., loras="):
        first.__exit__(None, None, None)
    assert torch.equal(drawn(), drawn.alone("dog"))
    second.__exit__(None, None, None)
    assert torch.equal(drawn(), drawn.everything)

    elsewhere = drawn.pipe.composing(["cat"])
    elsewhere.__enter__()
    with ThreadPoolExecutor(1) as threads, pytest.raises(MoLEError, match="in another thread or task than it began"):
        threads.submit(elsewhere.__exit__, None, None, None).result()
    assert torch.equal(drawn(), drawn.everything)
    with pytest.raises(RuntimeError, match="`use_loras` changes the LoRAs of a running call"):
        drawn.pipe.use_loras(["cat"])


LOADED = "Loaded are: cat, dog, mug"


@pytest.mark.parametrize(
    ("loras", "error", "message"),
    [
        (["fox"], ValueError, rf"`loras` has 'fox', which is not loaded\. {LOADED}"),
        ({"fox": 1.0}, ValueError, rf"`loras` has 'fox', which is not loaded\. {LOADED}"),
        (["cat", "cat"], ValueError, rf"`loras` has 'cat' twice\. {LOADED}"),
        ("cat", TypeError, r"must be None \(all\), a list .* got 'cat' \(str\)\. For one LoRA pass loras=\['cat'\]"),
        (True, TypeError, r"`loras` must be None .* got True \(bool\)"),
        (1, TypeError, r"`loras` must be None .* got 1 \(int\)"),
        ({"cat", "dog"}, TypeError, r"`loras` must be None .* \(set\)"),
        ([0], TypeError, r"`loras` must hold names of LoRAs, got 0 \(int\)"),
        ({"cat": True}, TypeError, r"the scale of 'cat' in `loras` must be a number, got True \(bool\)"),
        ({"cat": "0.8"}, TypeError, r"the scale of 'cat' in `loras` must be a number, got '0\.8' \(str\)"),
        (
            {"cat": float("nan")},
            ValueError,
            r"the scale of 'cat' in `loras` must be finite, and at most 1e\+06, got nan",
        ),
        (
            {"cat": float("inf")},
            ValueError,
            r"the scale of 'cat' in `loras` must be finite, and at most 1e\+06, got inf",
        ),
    ],
)
def test_a_wrong_choice_says_what_is_wrong(pipe: Any, loras: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        draw(pipe, loras=loras)


def test_a_misspelt_argument_is_not_swallowed(pipe: Any) -> None:
    with pytest.raises(TypeError, match="MoLEStableDiffusionPipeline has no argument 'lora'"):
        draw(pipe, lora=["cat"])


def test_naming_a_lora_before_any_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"'cat', which is not loaded\. None is loaded; call `load_loras` first"):
        draw(composing_pipeline(), loras=["cat"])
