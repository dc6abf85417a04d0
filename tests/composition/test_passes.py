"""Methods that change over the steps or run the denoiser several times a step: exact, whatever the batch."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image
from torch import Tensor

from mole_diffusion.composition import COMPOSITIONS, Composite, Merge, Step, StepComposition, Switch
from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import AttachError
from tests.composing import NAMES, PROMPT, assert_close, composing_pipeline, draw, lora_states
from tests.merging import merge_state

KEEP = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


@pytest.fixture(scope="module")
def pipe() -> Any:
    return composing_pipeline(*NAMES)


def step(index: int, total: int = 50) -> Step:
    timesteps = list(range(1000, 0, -1000 // total))[:total]
    return Step(float(timesteps[index]), timesteps)


def embeddings(pipe: Any, loras: Any = None) -> tuple[Tensor, Tensor]:
    """Prompt and negative prompt as the present composition reads them."""
    with pipe.composing(loras):
        prompt, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    return prompt, negative


def noise(pipe: Any, loras: Any, method: Any, **inputs: Any) -> Tensor:
    pipe.set_composition(method)
    with pipe.composing(loras), torch.no_grad():
        return pipe.unet(**inputs).sample


def unet_inputs(batch: int) -> dict[str, Any]:
    return {
        "sample": torch.randn(batch, 4, 16, 16),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 5, 32),
    }


class Counting(StepComposition):
    """Full weights; notes what it was asked for."""

    name = "counting"
    source = "this test"

    def __init__(self, constant: bool) -> None:
        self.constant = constant
        self.asked: list[Step | None] = []

    def weights(self, keep: Tensor, step: Step | None) -> Tensor:
        self.asked.append(step)
        return keep


@pytest.mark.parametrize("constant", [True, False])
def test_weights_that_stay_are_worked_out_once_a_call(pipe: Any, constant: bool) -> None:
    """Once for each component, whose text encoder reads two prompts; and another choice is another call."""
    pipe.set_composition(method := Counting(constant))
    for loras, count in ((["cat"], 1.0), (["cat", "dog"], 2.0)):
        method.asked.clear()
        drawn = draw(pipe, loras=loras, num_inference_steps=3)
        assert [one is None for one in method.asked] == ([True] * 2 if constant else [True] * 2 + [False] * 3)
        pipe.set_composition("normalized")
        assert_close(draw(pipe, loras=dict.fromkeys(loras, count), num_inference_steps=3), drawn)
        pipe.set_composition(method)


# --- merge ------------------------------------------------------------------------------------------------------------


def test_merge_is_the_plain_sum_times_its_scale(pipe: Any) -> None:
    assert torch.equal(Merge(0.7).weights(KEEP, step(3)), 0.7 * KEEP)
    pipe.set_composition(Merge(0.5))
    merged = draw(pipe)
    pipe.set_composition("linear")
    assert_close(merged, draw(pipe, loras=dict.fromkeys(NAMES, 0.5)))
    with pytest.raises(ValueError, match=r"`scale` must be finite, and at most 1e\+06, got nan\. The authors use 0\.8"):
        Merge(float("nan"))
    for scale in (1e300, -(10**400)):  # finite, and black
        with pytest.raises(ValueError, match="at most 1e"):
            Merge(scale)


# --- switch -----------------------------------------------------------------------------------------------------------


def test_switch_takes_turns_among_the_kept_loras() -> None:
    method, steps = Switch(), 50
    for k in range(steps):
        for keep, weights in zip(KEEP, method.weights(KEEP, step(k, steps)), strict=True):
            kept = keep.nonzero().flatten()
            expected = torch.zeros(3)
            expected[kept[(k // 5) % len(kept)]] = 1
            assert torch.equal(weights, expected)
    assert torch.equal(method.weights(KEEP, None), KEEP)  # the text encoder carries all
    with pytest.raises(MoLEError, match=r"10 steps leave none for 1 of 3\. Take more than 10 steps, fewer LoRAs, or"):
        method.weights(KEEP, step(0, 10))
    for enough, total in ((method, 11), (Switch(every=1), 10)):
        assert enough.weights(KEEP, step(0, total)).sum() == len(KEEP)
    with pytest.raises(ValueError, match="`every` must be at least 1 step, got 0"):
        Switch(0)
    with pytest.raises(ValueError, match="`every` must be at least 1 step, got nan"):
        Switch(float("nan"))  # type: ignore[arg-type]


@pytest.mark.parametrize("loras", [None, {"cat": 0.6, "mug": -1.3}])
def test_switch_draws_each_step_as_that_lora_alone(pipe: Any, loras: Any) -> None:
    pipe.set_composition("linear")
    prompt, negative = embeddings(pipe, loras)
    options: dict[str, Any] = {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "num_inference_steps": 6}
    turns = [[name] if loras is None else {name: loras[name]} for name in (loras or NAMES)]

    def next_lora(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.use_loras(turns[((index + 1) // 2) % len(turns)])
        return {}

    alone = draw(pipe, None, loras=turns[0], callback_on_step_end=next_lora, **options)
    pipe.set_composition(Switch(every=2))
    assert_close(draw(pipe, loras=loras, num_inference_steps=6), alone)


# --- composite --------------------------------------------------------------------------------------------------------


def test_composite_of_one_lora_is_that_lora(pipe: Any) -> None:
    pipe.set_composition("linear")
    linear = draw(pipe, loras={"dog": 0.7})
    pipe.set_composition("composite")
    assert torch.equal(draw(pipe, loras={"dog": 0.7}), linear)


def separately(pipe: Any, loras: dict[str, float], guidance: float, seed: int, images: int = 1) -> Tensor:
    """Eqs. of LoRA Composite, literally: N passes one by one, predictions averaged, then guidance, then a step."""
    pipe.set_composition("linear")
    prompt, negative = (x.repeat_interleave(images, dim=0) for x in embeddings(pipe, loras))
    pipe.scheduler.set_timesteps(2)
    latents = torch.randn(images, 4, 16, 16, generator=torch.manual_seed(seed))
    for timestep in pipe.scheduler.timesteps:
        both = []
        for text in (negative, prompt):
            inputs = {"sample": latents, "timestep": timestep, "encoder_hidden_states": text}
            both.append(sum(noise(pipe, {k: v}, "linear", **inputs) for k, v in loras.items()) / len(loras))
        predicted = both[0] + guidance * (both[1] - both[0]) if guidance > 1 else both[1]
        latents = pipe.scheduler.step(predicted, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("loras", [dict.fromkeys(NAMES, 1.0), {"cat": 0.5, "mug": 1.5}])
def test_composite_averages_separate_passes(pipe: Any, loras: dict[str, float], guidance: float) -> None:
    expected = separately(pipe, loras, guidance, seed=3)
    pipe.set_composition("composite")
    assert_close(draw(pipe, loras=loras, guidance_scale=guidance, seed=3), expected)


def test_composite_draws_several_pictures_of_a_prompt(pipe: Any) -> None:
    expected = separately(pipe, dict.fromkeys(NAMES, 1.0), 4.0, seed=1, images=2)
    pipe.set_composition("composite")
    assert_close(draw(pipe, guidance_scale=4.0, num_images_per_prompt=2, seed=1), expected)


def test_composite_without_loras_is_the_base_bit_for_bit(pipe: Any) -> None:
    pipe.set_composition("composite")
    assert torch.equal(draw(pipe, loras=[]), draw(composing_pipeline()))


def test_composite_with_rows_that_keep_different_loras(pipe: Any) -> None:
    inputs = unet_inputs(3)
    keep = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    pipe.set_composition("composite")
    with pipe.composing(), pipe.experts.using(keep=keep), torch.no_grad():
        drawn = pipe.unet(**inputs).sample

    def alone(names: list[str], row: int) -> Tensor:
        one = {k: v[row : row + 1] if v.ndim else v for k, v in inputs.items()}
        return noise(pipe, names, "linear", **one)

    expected = [(alone(["cat"], 0) + alone(["dog"], 0)) / 2, alone(["mug"], 1), alone([], 2)]
    assert_close(drawn, torch.cat(expected))


def test_a_stock_pipeline_around_the_models_averages_too(pipe: Any) -> None:
    pipe.set_composition("composite")
    stock = StableDiffusionPipeline.from_pipe(pipe)
    stock.set_progress_bar_config(disable=True)
    with pipe.composing(["cat", "dog"]):
        drawn = draw(stock)
    assert torch.equal(drawn, draw(pipe, loras=["cat", "dog"]))


def test_img2img_enters_the_schedule_in_the_middle_of_a_turn(pipe: Any) -> None:
    # The timesteps in use decide whose turn it is, not a count of calls.
    pipe.set_composition(Switch(every=1))
    stock = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    stock.set_progress_bar_config(disable=True)
    seen: list[list[float]] = []

    def note(*_: Any) -> dict[str, Any]:
        run = pipe.experts.context
        assert run is not None
        seen.append(pipe.composition._numbers(run)[0, 0].tolist())
        return {}

    with pipe.composing():
        picture = Image.new("RGB", (32, 32), "red")
        options: dict[str, Any] = {"strength": 0.5, "num_inference_steps": 6, "output_type": "latent"}
        stock(PROMPT, image=picture, callback_on_step_end=note, **options)
    assert seen == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]  # steps 3, 4 and 5 of 6


# --- the seam ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(COMPOSITIONS))
def test_every_method_declares_its_cost_and_where_it_comes_from(name: str) -> None:
    method = COMPOSITIONS[name]()
    assert method.source
    assert method.in_attention is ("attention" in method.needs)  # else layers would not ask it, or ask for nothing
    for count in (1, 2, 3):
        if not isinstance(method, StepComposition):
            assert method.evaluations(count) >= 1
            continue
        keep = torch.tensor([[1.0] * count + [0.0] * (3 - count)])
        passes = method.weights_by_pass(keep, step(2))
        assert method.evaluations(count) == len(passes)
        assert not passes[:, keep == 0].any()
        assert (method.weights(keep, None) > 0).equal(keep > 0)  # no LoRA's token is left unread


class Push(StepComposition):
    """Away from the base: what each LoRA adds to the base's prediction is summed."""

    name = "push"
    source = "this test"

    def weights(self, keep: Tensor, step: Step | None) -> Tensor:
        return keep

    def weights_by_pass(self, keep: Tensor, step: Step) -> Tensor:
        return torch.cat([torch.zeros_like(keep)[None], torch.diag_embed(keep).transpose(0, 1)])

    def mix(self, predictions: Tensor, weights: Tensor) -> Tensor:
        base, *others = predictions
        return base + sum(other - base for other in others)

    def evaluations(self, num_loras: int) -> int:
        return num_loras + 1


def test_a_new_method_is_a_class_and_an_entry(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPOSITIONS, "push", Push)
    inputs = unet_inputs(2)
    pushed = noise(pipe, None, "push", **inputs)
    base = noise(pipe, [], "push", **inputs)
    assert_close(pushed, base + sum(noise(pipe, [name], "linear", **inputs) - base for name in NAMES))


class Halves(Composite):
    """Two passes that share the LoRAs, combined by the seam's default."""

    name = "halves"

    def weights_by_pass(self, keep: Tensor, step: Step) -> Tensor:
        return torch.stack([keep, 0.5 * keep])

    mix = StepComposition.mix


def test_predictions_are_averaged_unless_a_method_says_otherwise(pipe: Any) -> None:
    inputs = unet_inputs(2)
    full, half = (noise(pipe, dict.fromkeys(NAMES, s), "linear", **inputs) for s in (1.0, 0.5))
    assert_close(noise(pipe, None, Halves(), **inputs), (full + half) / 2)


def test_everything_the_denoiser_is_given_by_row_is_widened(pipe: Any) -> None:
    inputs = unet_inputs(2)
    inputs["timestep"] = torch.tensor([500, 500])
    inputs["down_block_additional_residuals"] = tuple(
        torch.randn(2, c, s, s) for c, s in ((32, 16), (32, 16), (32, 8), (64, 8))
    )
    inputs["mid_block_additional_residual"] = torch.randn(2, 64, 8, 8)
    inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    expected = sum(noise(pipe, [name], "linear", **inputs) for name in NAMES) / 3
    assert_close(noise(pipe, None, "composite", **inputs), expected)
    positional = [inputs.pop(name) for name in ("sample", "timestep", "encoder_hidden_states")]
    with pipe.composing(), torch.no_grad():
        assert_close(pipe.unet(*positional, **inputs, return_dict=False)[0], expected)


def test_gradients_flow_through_all_passes(pipe: Any) -> None:
    def gradient(loras: Any, method: str) -> Tensor:
        sample = inputs["sample"].clone().requires_grad_()
        pipe.set_composition(method)
        with pipe.composing(loras):
            pipe.unet(**{**inputs, "sample": sample}).sample.square().sum().backward()
        assert sample.grad is not None
        return sample.grad

    inputs = unet_inputs(1)
    means = torch.stack([noise(pipe, [n], "linear", **inputs) for n in NAMES]).mean(0)
    sample = inputs["sample"].clone().requires_grad_()
    pipe.set_composition("linear")
    total = torch.zeros(())
    for name in NAMES:  # d/dx |mean_i f_i(x)|^2 = 2 mean . mean_i f_i'(x)
        with pipe.composing([name]):
            total = total + (2 * means * pipe.unet(**{**inputs, "sample": sample}).sample).sum() / 3
    total.backward()
    assert sample.grad is not None
    assert_close(gradient(None, "composite"), sample.grad, atol=1e-3)


def merging_tokens(unet: Any, into: int = 2) -> None:
    """Attention of every second token, as ToMe has it: blocks get another class."""

    class Merged(BasicTransformerBlock):
        def forward(self, hidden_states: Tensor, *_: Any, encoder_hidden_states: Any = None, **__: Any) -> Tensor:
            text = encoder_hidden_states
            for norm, attention, words in ((self.norm1, self.attn1, None), (self.norm2, self.attn2, text)):
                few = norm(hidden_states)[:, ::into]
                hidden_states = hidden_states + attention(few, encoder_hidden_states=words).repeat_interleave(
                    into, dim=1
                )
            return self.ff(self.norm3(hidden_states)) + hidden_states

    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            module.__class__ = Merged


def merging_to_the_next_level(unet: Any) -> None:
    """As many tokens as the next lower level has, which are not those of its grid."""
    merging_tokens(unet, into=4)


def reading_a_reference(unet: Any) -> None:
    """Self-attention that also reads what another forward pass read there, as pipelines of references have it."""
    read: dict[Any, Tensor] = {}
    writing = [False]

    def forward(self: Any, hidden_states: Tensor, *_: Any, encoder_hidden_states: Any = None, **__: Any) -> Tensor:
        own = self.norm1(hidden_states)
        read.update({self: own} if writing[0] else {})
        both = own if writing[0] else torch.cat([own, read[self]], dim=1)
        hidden_states = self.attn1(own, encoder_hidden_states=both) + hidden_states
        text = self.attn2(self.norm2(hidden_states), encoder_hidden_states=encoder_hidden_states)
        hidden_states = text + hidden_states
        return self.ff(self.norm3(hidden_states)) + hidden_states

    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            module.forward = types.MethodType(forward, module)
    whole = unet.forward

    def twice(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        writing[0] = True
        whole(0.9 * sample, *args, **kwargs)
        writing[0] = False
        return whole(sample, *args, **kwargs)

    unet.forward = twice


def of_free_u(unet: Any) -> None:
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


@pytest.mark.parametrize("change", [merging_tokens, merging_to_the_next_level, reading_a_reference, of_free_u])
def test_what_others_change_in_a_model_goes_through_the_loras(change: Callable[[Any], None]) -> None:
    pipe, merged = composing_pipeline("cat"), composing_pipeline()
    merge_state(merged, lora_states(merged)["cat"])
    pipe.set_composition("linear")
    before = draw(pipe)
    for changed in (pipe, merged):
        change(changed.unet)
    drawn = draw(pipe)
    assert_close(drawn, draw(merged))
    assert (drawn - before).abs().max() > 0.01
    if change is not of_free_u:
        pipe.set_composition("masks")
        with pytest.raises(MoLEError, match=r"tokens at .* are no picture of a sample of size \(16, 16\).*budget"):
            draw(pipe, regions={"cat": (0, 0, 0.5, 1)})
    pipe.set_composition("composite")
    assert_close(draw(pipe), drawn)


class Derived(UNet2DConditionModel):
    """A model whose class says nothing of its arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_steps_are_read_whatever_stands_in_the_place_of_forward() -> None:
    def wrapped(pipe: Any) -> None:  # as DeepCache has it
        whole = pipe.unet.forward
        pipe.unet.forward = lambda *args, **kwargs: whole(*args, **kwargs)

    def derived(pipe: Any) -> None:
        pipe.unet.__class__ = Derived

    pipe = composing_pipeline(*NAMES)
    for change in (wrapped, derived):
        changed = composing_pipeline(*NAMES)
        change(changed)
        for method in (Switch(every=1), "composite"):
            for one in (pipe, changed):
                one.set_composition(method)
            assert torch.equal(draw(changed, num_inference_steps=3), draw(pipe, num_inference_steps=3))


def test_a_model_whose_call_is_passed_by_is_refused_where_the_step_matters(pipe: Any) -> None:
    inputs = unet_inputs(1)
    expected = noise(pipe, None, "linear", **inputs)
    with pipe.composing(), torch.no_grad():
        assert_close(pipe.unet.forward(**inputs).sample, expected)
    for method in ("switch", "composite", "masks"):
        pipe.set_composition(method)
        with (
            pipe.composing(regions={name: (0, 0, 1, 1) for name in NAMES} if method == "masks" else None),
            pytest.raises(MoLEError, match=r"needs to know the step, and modules of the unet run without a call of it"),
        ):
            pipe.unet.forward(**inputs)


def test_an_error_in_a_widened_pass_leaves_no_trace(pipe: Any) -> None:
    pipe.set_composition("composite")
    before = draw(pipe)
    with pipe.composing(), pytest.raises((RuntimeError, AttachError)):
        pipe.unet(torch.randn(2, 3, 16, 16), 5, torch.randn(2, 5, 32))  # 3 channels instead of 4
    assert torch.equal(draw(pipe), before)
