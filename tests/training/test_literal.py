"""`train_gates` beside the same training written down literally: float64, merged weights, no hooks, no gates."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.gating import GateConfig
from mole_diffusion.pipelines import MoLEStableDiffusionPipeline
from mole_diffusion.training.engine.randomness import step_generator
from mole_diffusion.training.gates.walk import Walker
from tests import reference
from tests.gate_training import config, train
from tests.tiny import ATTENTION, random_lora, tiny_pipeline

PROMPTS = ("a cat on grass", "a dog in the sand")


def literal_training(walker: Walker, states: list[dict[str, Tensor]], clip: Any) -> tuple[list[float], Tensor]:
    """Losses of every step, and in the end the gate's two numbers and log tau, as one vector.

    Only the random numbers are the library's.
    """
    settings = walker.config
    pipe = tiny_pipeline().to(torch.float64)
    weights = {name: value.detach() for name, value in pipe.unet.named_parameters()}
    changes: list[dict[str, Tensor]] = []
    for state in states:
        down = {key.split(".lora")[0][5:]: value.double() for key, value in state.items() if "lora_A" in key}
        up = {key.split(".lora")[0][5:]: value.double() for key, value in state.items() if "lora_B" in key}
        changes.append({f"{name}.weight": up[name] @ down[name] for name in down})
    a = walker.schedule.alphas_cumprod.double().tolist()
    texts = clip.encode_text(list(PROMPTS)).double()
    mean, std = clip.mean.double(), clip.std.double()
    model = copy.deepcopy(clip.model).double()

    learned = torch.zeros(3, dtype=torch.float64)
    losses: list[float] = []
    gradients: list[Tensor] = []
    for step in range(settings.steps):
        generator = step_generator(settings.seed, step)
        chosen = torch.randint(2, (settings.batch_size,), generator=generator).tolist()
        plan = walker.plan(generator)
        noisy = plan.noise.double()
        embeds = pipe.encode_prompt(["", ""] + [PROMPTS[k] for k in chosen], "cpu", 1, False)[0].detach()
        of_step: list[Tensor] = []
        values: list[float] = []
        for now, after in zip(plan.timesteps, plan.timesteps[1:], strict=False):
            fresh = plan.fresh_noise(settings.eta)
            assert fresh is not None
            leaf = learned.clone().requires_grad_()
            exponentials = (leaf[:2] / leaf[2].exp()).exp()
            gates = exponentials / exponentials.sum()  # eq. 11
            merged = dict(weights)  # eqs. 12-13 for linear experts: W + sum_i G_i Delta W_i
            for name in changes[0]:
                merged[name] = weights[name] + gates[0] * changes[0][name] + gates[1] * changes[1][name]
            prediction = functional_call(
                pipe.unet, merged, (torch.cat([noisy, noisy]), torch.tensor(now)), {"encoder_hidden_states": embeds}
            ).sample
            without, with_prompt = prediction.chunk(2)
            noise = without + settings.guidance_scale * (with_prompt - without)
            clean = (noisy - math.sqrt(1 - a[now]) * noise) / math.sqrt(a[now])
            images = pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample / 2 + 0.5
            features = model.encode_image((images.clamp(0, 1) - mean) / std, normalize=True)
            guidance = sum(1 - (features[k] * texts[chosen[k]]).sum() for k in range(2)) / 2
            balance = -gates[0].log() - gates[1].log()  # eq. 14 with one gated place
            loss = guidance + settings.balance_weight * balance  # eq. 16
            of_step.append(torch.autograd.grad(loss, leaf)[0])
            values.append(loss.item())
            noisy = reference.ddim(
                clean.detach(), noise.detach(), fresh.double(), a[now], a[after] if after >= 0 else 1.0, settings.eta
            )
        gradients.append(torch.stack(of_step).mean(dim=0))
        losses.append(sum(values) / len(values))
        rates = [settings.learning_rate * factor for factor in (0.5, 1.0, 0.5)]  # one warm-up step, then a cosine
        learned = reference.adamw(
            torch.zeros(3, dtype=torch.float64),
            gradients,
            rates[: step + 1],
            settings.weight_decay,
            settings.max_grad_norm,
        )
    return losses, learned


@pytest.mark.parametrize("max_grad_norm", [1.0, 1e-4])
def test_training_equals_its_literal_transcription(clip: DifferentiableCLIP, max_grad_norm: float) -> None:
    """Two walks of ancestral steps with a loss at each, guidance, balance, warm-up, decay, clipping; float32 here."""
    pipe = tiny_pipeline(MoLEStableDiffusionPipeline)
    states = [random_lora({"unet": pipe.unet}, targets=ATTENTION, seed=seed) for seed in range(2)]
    pipe.load_loras({f"lora{seed}": state for seed, state in enumerate(states)})
    settings = config(
        gates=GateConfig(input="none", scope="network"),
        steps=3,
        batch_size=2,
        warmup_steps=1,
        gradient_steps=0,
        eta=1.0,
        learning_rate=0.3,
        weight_decay=0.1,
        max_grad_norm=max_grad_norm,
        seed=2,
    )
    losses: list[float] = []

    def note(step: int, numbers: Mapping[str, float]) -> None:
        losses.append(numbers["loss"])

    gates = train(pipe, settings, clip, prompts=PROMPTS, on_step_end=note)
    gate: Any = gates.gates["unet"]
    ours = torch.cat([gate.weight.detach().flatten(), gate.log_temperature.detach()[None]])
    expected_losses, expected = literal_training(Walker(pipe, settings), states, clip)
    assert losses == pytest.approx(expected_losses, abs=1e-4)
    assert expected.abs().min() > 0.01
    torch.testing.assert_close(ours.double(), expected, atol=2e-3, rtol=0)
