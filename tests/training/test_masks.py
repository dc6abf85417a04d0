"""Gates trained on top of masks: the walk finds masks as a call does, and only what was refused is left untrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.composition import MaskedGates, Masks
from mole_diffusion.gating import GateConfig
from mole_diffusion.pipelines import MoLEStableDiffusionPipeline
from mole_diffusion.training import GateTrainingConfig
from mole_diffusion.training.engine.randomness import step_generator
from mole_diffusion.training.gates.masks import WalkMasks
from mole_diffusion.training.gates.walk import Walker
from tests.gate_training import train
from tests.tiny import ATTENTION, TEXT_ENCODER, random_lora, tiny_pipeline

PROMPTS = ["a cat and a dog on grass", "a dog and a cat in the sand"]


def masks_config(**changes: Any) -> GateTrainingConfig:
    settings = {"steps": 2, "batch_size": 2, "warmup_steps": 0, "rollout_steps": 4, "guidance_scale": 2.0}
    return GateTrainingConfig.from_dict({"preset": "masks", "identity_weight": 0, **settings, **changes})


def bound_pipeline() -> Any:
    pipe = tiny_pipeline(MoLEStableDiffusionPipeline)
    targets = (ATTENTION, TEXT_ENCODER)
    states = {name: random_lora(pipe.components, targets=targets, seed=k) for k, name in enumerate(("cat", "dog"))}
    pipe.load_loras(states, triggers={"cat": "cat", "dog": "dog"})
    return pipe


@torch.no_grad()
@pytest.mark.parametrize("method", [Masks(), Masks(online=True)])
def test_a_walk_is_a_call_of_the_pipeline(method: Masks) -> None:
    """From the same noise to the same latents, with the same masks."""
    pipe = bound_pipeline()
    pipe.scheduler = DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    config = masks_config()
    for parameter in pipe.init_gates(config.gates).gate_parameters():
        parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 10
    pipe.set_composition(MaskedGates(method))
    walker = Walker(pipe, config)
    plan = walker.plan(step_generator(0, 0))
    masks, noisy = WalkMasks(walker, plan, PROMPTS), plan.noise
    with pipe.composing(), masks.known():
        embeds = walker.encode(PROMPTS)
        masks.encoded(embeds)
        masks.find(noisy, slice(0, 2), embeds)
        for now, after in zip(plan.timesteps, plan.timesteps[1:], strict=False):
            noisy = walker.advance(walker.predict(noisy, now, embeds), noisy, now, after, None)
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"}
    drawn = pipe(PROMPTS, latents=plan.noise, **options).images
    assert masks.call.found is not None
    assert torch.equal(masks.call.found.values, pipe.masks.values)
    torch.testing.assert_close(noisy, drawn, rtol=1e-4, atol=1e-4)


def test_the_walk_draws_the_same_fresh_noise_after_looking() -> None:
    pipe = bound_pipeline()
    config = masks_config(eta=1.0)
    pipe.init_gates(config.gates)
    walker = Walker(pipe, config)
    plans = [walker.plan(step_generator(0, 0)) for _ in range(2)]
    masks = WalkMasks(walker, plans[0], PROMPTS)
    with pipe.composing(), masks.known():
        embeds = walker.encode(PROMPTS)
        masks.encoded(embeds)
        masks.find(plans[0].noise, slice(0, 2), embeds)
    noise: list[Tensor | None] = [plan.fresh_noise(1.0) for plan in plans]
    assert isinstance(noise[0], Tensor)
    assert isinstance(noise[1], Tensor)
    assert torch.equal(noise[0], noise[1])
    assert masks.call.prior is False


def test_losses_are_taken_where_loras_act() -> None:
    pipe = bound_pipeline()
    config = masks_config(rollout_steps=10, gradient_steps=0)
    pipe.init_gates(config.gates)
    walker = Walker(pipe, config)
    assert walker.plan(step_generator(0, 0)).gradient_at == tuple(range(1, 10))
    pipe.set_composition(MaskedGates(Masks(online=True)))
    assert walker.plan(step_generator(0, 0)).gradient_at == tuple(range(4, 10))


def test_gates_learn_on_masks_and_go_to_disk(clip: DifferentiableCLIP, tmp_path: Path) -> None:
    pipe = bound_pipeline()
    gates = train(pipe, masks_config(gradient_accumulation=2), clip, prompts=PROMPTS, out=tmp_path, pictures=False)
    learned = [value for name, value in gates.named_parameters() if name.endswith(".weight")]
    assert all(value[..., :-2].any() for value in learned)
    assert all(value[..., -2:].any() for value in learned)
    other = bound_pipeline()
    other.load_gates(tmp_path)
    assert isinstance(other.composition, MaskedGates)
    whole = train(bound_pipeline(), masks_config(gradient_checkpointing=True), clip, prompts=PROMPTS)
    for name, value in whole.named_parameters():
        torch.testing.assert_close(value, dict(gates.named_parameters())[name], atol=2e-3, rtol=0)


def test_what_gates_on_masks_cannot_be_trained_on(clip: DifferentiableCLIP) -> None:
    pipe = bound_pipeline()
    with pytest.raises(ValueError, match=r"the prompt 'a cat' lacks the words that call a LoRA: 'dog'"):
        train(pipe, masks_config(), clip, prompts=["a cat and a dog", "a cat"])
    assert pipe.gates is None
    with pytest.raises(ValueError, match=r'share nothing out.*Use balance="off"'):
        GateTrainingConfig(gates=GateConfig(input="hidden", token_axis="token", residual=True), balance="uniform")
