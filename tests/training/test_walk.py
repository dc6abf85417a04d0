"""The walk that gate training takes down the schedule, beside diffusers' own loop and the equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mole_diffusion.errors import MoLEError
from mole_diffusion.training.engine.flow import FlowSchedule
from mole_diffusion.training.engine.noise import NoiseSchedule
from mole_diffusion.training.engine.randomness import step_generator
from mole_diffusion.training.engine.schedule import schedule_of
from mole_diffusion.training.gates.walk import Walker
from tests import reference
from tests.gate_training import PROMPTS, config, mole_pipeline


def zero_snr(pipe: Any) -> None:
    pipe.scheduler = DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )


@torch.no_grad()
def test_the_walk_is_diffusers_ddim() -> None:
    """From the same noise to the same latents as the pipeline's own loop, gates, guidance and all.

    In 4 steps: where T is no multiple of the steps, diffusers' DDIM takes the next timestep one off its own list.
    """
    pipe = mole_pipeline()
    pipe.init_gates()
    zero_snr(pipe)
    walker = Walker(pipe, config(rollout_steps=4, guidance_scale=2.0, batch_size=2))
    plan = walker.plan(step_generator(0, 0))
    noisy, walked = plan.noise, []
    with pipe.composing():
        for now, after in zip(plan.timesteps, plan.timesteps[1:], strict=False):
            prediction = walker.predict(noisy, now, walker.encode(list(PROMPTS)))
            noisy = walker.advance(prediction, noisy, now, after, None)
            walked.append(noisy)
    reached: list[Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        reached.append(tensors["latents"])
        return tensors

    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"}
    pipe(list(PROMPTS), latents=plan.noise, callback_on_step_end=keep, **options)
    assert plan.timesteps == (*pipe.scheduler.timesteps.tolist(), -1)
    for ours, theirs in zip(walked[:-1], reached[:-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    # Of the last step, diffusers' `set_alpha_to_one` makes the clean picture, as the index -1 does here.
    torch.testing.assert_close(walked[-1], reached[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_step_with_fresh_noise_is_its_equation(eta: float) -> None:
    pipe = mole_pipeline()
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    clean, noise, fresh = torch.randn(3, 2, 4, 5, 5).unbind(0)
    a = schedule.alphas_cumprod.double().tolist()
    for now, after in ((999, 700), (300, 0), (100, -1)):
        t, s = torch.full((2,), now), torch.full((2,), after)
        noisy = schedule.add_noise(clean, noise, t)
        expected = reference.ddim(
            clean.double(), noise.double(), fresh.double(), a[now], a[after] if after >= 0 else 1.0, eta
        )
        ours = schedule.step(noise, noisy, t, s, fresh, eta)
        torch.testing.assert_close(ours.double(), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_step_of_flow_matching_is_that_of_diffusers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = schedule_of(scheduler)
    timesteps = schedule.trailing_timesteps(4)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(torch.tensor(timesteps), scheduler.timesteps)
    ours = theirs = torch.randn(2, 4, 5, 5)
    for index, (now, after) in enumerate(zip(timesteps, [*timesteps[1:], schedule.clean], strict=True)):
        prediction = torch.randn(2, 4, 5, 5)
        theirs = scheduler.step(prediction, scheduler.timesteps[index], theirs).prev_sample
        ours = schedule.step(prediction, ours, torch.full((2,), now), torch.full((2,), after))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_flow_matching_with_fresh_noise_keeps_the_noise_level(eta: float) -> None:
    """Of a model that knows the clean picture, the next sample is that picture and noise of the next level."""
    schedule = FlowSchedule(1000, 1.0)
    clean, noise, fresh = torch.randn(3, 2, 4, 5, 5).double().unbind(0)
    now, after = 0.8, 0.3
    noisy = (1 - now) * clean + now * noise
    t, s = torch.full((2,), 1000 * now), torch.full((2,), 1000 * after)
    expected = (1 - after) * clean + after * ((1 - eta**2) ** 0.5 * noise + eta * fresh)
    torch.testing.assert_close(schedule.step(noise - clean, noisy, t, s, fresh, eta), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(schedule.predict_clean(noise - clean, noisy, t), clean, atol=1e-6, rtol=1e-6)


def test_a_scheduler_of_neither_kind_is_refused() -> None:
    with pytest.raises(MoLEError, match="CMStochasticIterativeScheduler has no `alphas_cumprod`"):
        schedule_of(CMStochasticIterativeScheduler())


@pytest.mark.parametrize("gradient_steps", [0, 1, 3])
def test_plans(gradient_steps: int) -> None:
    pipe = mole_pipeline()
    walker = Walker(pipe, config(rollout_steps=4, rollout_steps_max=6, gradient_steps=gradient_steps, batch_size=3))
    plans = [walker.plan(step_generator(0, step)) for step in range(60)]
    lengths = [len(plan.timesteps) - 1 for plan in plans]
    assert set(lengths) == {4, 5, 6}
    for plan, length in zip(plans, lengths, strict=True):
        assert plan.timesteps[0] == 999
        assert plan.timesteps[-1] == -1
        assert len(plan.gradient_at) == (gradient_steps or length)
        assert list(plan.gradient_at) == sorted(set(plan.gradient_at))
        assert plan.noise.shape == (3, 4, 16, 16)
    assert {place for plan in plans for place in plan.gradient_at} == set(range(6))


@pytest.mark.parametrize(
    ("update_every", "sizes"), [(0, [5, 5, 5, 5, 5]), (1, [1, 1, 1, 1, 1]), (2, [2, 2, 2, 2, 1]), (9, [5, 5, 5, 5, 5])]
)
def test_every_loss_goes_into_one_update(update_every: int, sizes: list[int]) -> None:
    """Also the odd last one."""
    plan = Walker(mole_pipeline(), config(rollout_steps=5, gradient_steps=0)).plan(step_generator(0, 0))
    assert [plan.losses_in_update(index, update_every) for index in range(5)] == sizes
    ends = [index for index in range(5) if plan.ends_update(index, update_every)]
    assert ends == {0: [4], 1: [0, 1, 2, 3, 4], 2: [1, 3, 4], 9: [4]}[update_every]


def test_a_walk_at_another_resolution_than_the_bases() -> None:
    pipe = mole_pipeline()
    walker = Walker(pipe, config(resolution=48))
    assert pipe.unet.config.sample_size * pipe.vae_scale_factor == 32
    assert walker.plan(step_generator(0, 0)).noise.shape == (1, 4, 24, 24)
    with pytest.raises(MoLEError, match="multiple of 8 pixels"):
        config(resolution=20)
