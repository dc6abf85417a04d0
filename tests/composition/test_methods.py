"""Methods give the numbers of their equations, and a method may depend on the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler
from torch import Tensor

from mole_diffusion.composition import COMPOSITIONS, Composition, Linear, Normalized, Step, StepComposition
from tests.composing import assert_close, composing_pipeline, draw

KEEP = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


def test_a_linear_sum_keeps_every_lora_whole() -> None:
    assert torch.equal(Linear().weights(KEEP, None), KEEP)


def test_a_normalised_sum_sums_to_one_over_the_kept_loras() -> None:
    weights = Normalized().weights(KEEP, None)
    assert torch.allclose(weights, torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]))


def test_a_row_that_keeps_nothing_gets_nothing() -> None:
    assert torch.equal(Normalized().weights(torch.zeros(1, 3), None), torch.zeros(1, 3))


def test_every_method_is_listed_under_its_name() -> None:
    assert set(COMPOSITIONS) == {
        "linear",
        "normalized",
        "budget",
        "merge",
        "switch",
        "composite",
        "masks",
        "freefuse",
        "norm_router",
        "mole",
        "masked_gates",
    }
    assert all(method.name == name for name, method in COMPOSITIONS.items())


@pytest.mark.parametrize(
    ("timesteps", "indices", "total"),
    [
        ([900, 600, 300], [0, 1, 2], 3),
        ([900.0, 600.0, 600.0, 300.0, 300.0], [0, 1, 1, 2, 2], 3),  # Heun calls the model twice in a step
    ],
)
def test_a_step_knows_its_place(timesteps: list[float], indices: list[int], total: int) -> None:
    steps = [Step(torch.tensor([t, t]), torch.tensor(timesteps)) for t in timesteps]
    assert [step.index for step in steps] == indices
    assert {step.total for step in steps} == {total}


class Rotate(StepComposition):
    """One LoRA per step in turn; none in the text encoder."""

    name = "rotate"

    def __init__(self) -> None:
        self.seen: list[int | None] = []

    def weights(self, keep: Tensor, step: Step | None) -> Tensor:
        self.seen.append(None if step is None else step.index)
        if step is None:
            return torch.zeros_like(keep)
        return torch.nn.functional.one_hot(torch.tensor([step.index % keep.shape[1]]), keep.shape[1]).float()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Heun under NumPy 2
@pytest.mark.parametrize(
    ("scheduler", "steps", "indices"),
    [
        (DDIMScheduler, 3, [0, 1, 2]),
        (HeunDiscreteScheduler, 3, [0, 1, 1, 2, 2]),
        # Its first three steps are Runge-Kutta's: begin, twice halfway, end.
        (PNDMScheduler, 5, [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4]),
    ],
)
def test_weights_may_change_from_step_to_step(scheduler: Any, steps: int, indices: list[int]) -> None:
    pipe = composing_pipeline("cat", "dog")
    pipe.scheduler = scheduler.from_config({**pipe.scheduler.config, "skip_prk_steps": False})
    method = Rotate()
    pipe.set_composition(method)
    draw(pipe, num_inference_steps=steps)
    # One call each for the prompt and the negative prompt, then one per call of the denoiser.
    assert method.seen == [None, None, *indices]


def test_rotating_draws_each_step_with_its_own_lora() -> None:
    pipe = composing_pipeline("cat", "dog")
    with pipe.composing([]):
        prompt_embeds, _ = pipe.encode_prompt("a cat", "cpu", 1, False)
    options: dict[str, Any] = {"prompt_embeds": prompt_embeds, "guidance_scale": 1.0}
    pipe.set_composition(Rotate())
    rotated = draw(pipe, None, **options)

    def next_lora(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.use_loras(["dog"])
        return {}

    pipe.set_composition("linear")
    # A LoRA that is left out is not computed, one of weight 0 is: sums come in another order.
    assert_close(rotated, draw(pipe, None, loras=["cat"], callback_on_step_end=next_lora, **options))
    assert not torch.allclose(rotated, draw(pipe, None, loras=["cat"], **options), rtol=0, atol=1e-4)


def test_a_method_that_answers_in_another_shape_is_told() -> None:
    class Flat(Composition):
        name = "flat"
        source = "this test"

        def weigh(self, site: Any, projections: Any, run: Any) -> Tensor:
            return run.keep

    pipe = composing_pipeline("cat")
    pipe.set_composition(Flat())
    with pytest.raises(ValueError, match=r"weights for text_encoder\..* must be \(1 or 1, 1 or 16, 1\), got \(1, 1\)"):
        draw(pipe)


@pytest.mark.parametrize(
    ("timesteps", "order", "indices"),
    [
        # KDPM2 goes from step to step over a point on the way; Heun visits the end twice; the ancestral one's last
        # point on the way is the end.
        ([900.0, 750.0, 600.0, 450.0, 300.0], 2, [0, 1, 1, 2, 2]),
        ([900.0, 600.0, 600.0, 300.0, 300.0], 2, [0, 1, 1, 2, 2]),
        ([900.0, 750.0, 600.0, 0.0, 0.0], 2, [0, 1, 1, 2, 2]),
    ],
)
def test_evaluations_of_a_second_order_scheduler_stay_in_their_step(
    timesteps: list[float], order: int, indices: list[int]
) -> None:
    steps = [Step(t, timesteps, order) for t in timesteps]
    assert [step.index for step in steps] == indices
    assert {step.total for step in steps} == {3}


def test_a_timestep_of_another_scheduler_is_refused() -> None:
    with pytest.raises(ValueError, match=r"timestep 500, which is none of the 3 steps.*composing\(scheduler="):
        _ = Step(500, [900, 600, 300]).index
