"""`train_gates`: settings, only gates learn, resuming, what it leaves behind; on a tiny model and a random CLIP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.gating import GateConfig, MoLEModel
from mole_diffusion.pipelines import MoLEStableDiffusionPipeline
from mole_diffusion.training import GateTrainingConfig, TrainingDivergedError, train_gates
from mole_diffusion.training.gates import _predict_images, _walk
from mole_diffusion.training.loop import step_generator
from mole_diffusion.training.noise import NoiseSchedule
from tests.test_clip import write_clip
from tests.tiny import random_lora, tiny_pipeline

PROMPTS = ("a cat on grass", "a dog in the sand")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> DifferentiableCLIP:
    torch.manual_seed(0)
    return DifferentiableCLIP(write_clip(tmp_path_factory.mktemp("clip")))


def mole_pipeline(loras: int = 2) -> Any:
    pipe = tiny_pipeline(MoLEStableDiffusionPipeline)
    if loras:
        pipe.load_loras({f"lora{seed}": random_lora(pipe.components, seed=seed) for seed in range(loras)})
    return pipe


def config(**changes: Any) -> GateTrainingConfig:
    settings: dict[str, Any] = {
        "steps": 2,
        "batch_size": 1,
        "warmup_steps": 0,
        "rollout_steps": 2,
        "guidance_scale": 2.0,
    }
    return GateTrainingConfig(**(settings | changes))


def train(pipe: Any, settings: GateTrainingConfig, clip: DifferentiableCLIP, **options: Any) -> MoLEModel:
    return train_gates(pipe, settings, **({"prompts": PROMPTS, "clip": clip, "progress": False} | options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"balance_weight": -1.0}, "`balance_weight` must be 0 or more, got -1.0"),
        ({"rollout_steps": 0}, "`rollout_steps` must be at least 1, got 0"),
        ({"guidance_scale": 0.5}, r"`guidance_scale` must be at least 1 \(no guidance\), got 0.5"),
        ({"steps": 0}, "`steps` must be at least 1"),
    ],
)
def test_settings_that_cannot_be_say_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_what_cannot_be_trained_says_why(clip: DifferentiableCLIP) -> None:
    with pytest.raises(ValueError, match="StableDiffusionPipeline composes no LoRAs"):
        train(tiny_pipeline(StableDiffusionPipeline), config(), clip)
    with pytest.raises(ValueError, match=r"at least two must be loaded; loaded are \['lora0'\]"):
        train(mole_pipeline(1), config(), clip)
    with pytest.raises(ValueError, match=r"loaded are \[\]"):
        train(mole_pipeline(0), config(), clip)
    pipe = mole_pipeline()
    with pytest.raises(ValueError, match="list of at least one prompt"):
        train(pipe, config(), clip, prompts=[])
    with pytest.raises(ValueError, match="one prompt twice"):
        train(pipe, config(), clip, prompts=["a cat", "a cat"])
    with pytest.raises(ValueError, match="no entry for 'a dog in the sand' "):
        train(pipe, config(), clip, clip_prompts={PROMPTS[0]: "a red cat"})


def test_gradients_reach_every_gate_and_nothing_else(clip: DifferentiableCLIP) -> None:
    pipe = mole_pipeline()
    models = [pipe.unet, pipe.text_encoder, pipe.vae, clip]
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    fresh = {name: value.detach().clone() for name, value in pipe.init_gates(GateConfig()).named_parameters()}

    gates = train(pipe, config(steps=3), clip)

    assert gates is pipe.gates
    # The first step moves the weights, the next ones the temperatures: at uniform gates tau has no gradient.
    assert {name for name, value in gates.named_parameters() if torch.equal(value, fresh[name])} == set()
    assert any(name.startswith("gates.text_encoder") for name in fresh)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())


def test_the_balance_loss_evens_gates_out(clip: DifferentiableCLIP) -> None:
    def unevenness(weight: float) -> float:
        losses: list[float] = []
        settings = config(steps=8, learning_rate=0.05, balance_weight=weight, rollout_steps=1, guidance_scale=1.0)
        train(mole_pipeline(), settings, clip, on_step_end=lambda step, terms: losses.append(terms["balance"]))
        return losses[-1]

    assert unevenness(0.0) > unevenness(5.0) + 1e-4


def test_training_makes_clip_like_the_picture_more(clip: DifferentiableCLIP) -> None:
    pipe = mole_pipeline()
    settings = config(steps=12, learning_rate=0.05, balance_weight=0.0, rollout_steps=1, guidance_scale=1.0)
    pipe.init_gates(settings.gates)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    target = clip.encode_text(PROMPTS[:1])

    @torch.no_grad()
    def score() -> float:
        total = 0.0
        for seed in range(4):
            with pipe.composing():
                place = _walk(pipe, schedule, settings, list(PROMPTS[:1]), step_generator(99, seed))
                images = _predict_images(pipe, schedule, settings, list(PROMPTS[:1]), *place)
            total += (clip.encode_image(images) * target).sum().item()
        return total / 4

    before = score()
    train(pipe, settings, clip, prompts=PROMPTS[:1])
    assert score() > before


def test_the_walk_is_diffusers_ddim() -> None:
    """From the same noise to the same latents as the pipeline's own loop, gates, guidance and all.

    In 4 steps: where T is no multiple of the steps, diffusers' DDIM takes the next timestep one off its own list.
    """
    pipe = mole_pipeline()
    pipe.init_gates()
    pipe.scheduler = DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    settings = config(rollout_steps=4, guidance_scale=2.0, batch_size=2)
    seed = next(s for s in range(99) if int(torch.randint(4, (), generator=step_generator(0, s))) == 2)
    with pipe.composing():
        noisy, timesteps = _walk(
            pipe, NoiseSchedule.from_scheduler(pipe.scheduler), settings, list(PROMPTS), step_generator(0, seed)
        )
    generator = step_generator(0, seed)
    torch.randint(4, (), generator=generator)
    reached: list[Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        reached.append(tensors["latents"])
        return tensors

    pipe(
        list(PROMPTS),
        latents=torch.randn(2, 4, 16, 16, generator=generator),
        num_inference_steps=4,
        guidance_scale=2.0,
        output_type="latent",
        callback_on_step_end=keep,
    )
    assert timesteps.tolist() == [pipe.scheduler.timesteps[2].item()] * 2
    torch.testing.assert_close(noisy, reached[1], rtol=1e-4, atol=1e-4)


def test_the_same_training_gives_the_same_gates_in_one_go_or_in_two(clip: DifferentiableCLIP, tmp_path: Path) -> None:
    settings = config(steps=3, checkpoint_every=1, learning_rate=0.05)
    whole = train(mole_pipeline(), settings, clip, out=tmp_path / "whole")

    def cut(step: int, losses: Mapping[str, float]) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(mole_pipeline(), settings, clip, work=tmp_path / "work", on_step_end=cut)
    steps: list[int] = []
    resumed = train(
        mole_pipeline(),
        settings,
        clip,
        work=tmp_path / "work",
        out=tmp_path / "resumed",
        on_step_end=lambda step, losses: steps.append(step),
    )
    assert steps == [3]
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    reports = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "resumed")]
    assert reports[0] == reports[1]
    assert {name: len(values) for name, values in reports[0]["losses"].items()} == {"loss": 3, "clip": 3, "balance": 3}
    assert reports[0]["config"]["gates"] == GateConfig().to_dict()

    loaded = mole_pipeline()
    loaded.load_gates(tmp_path / "whole")
    assert all(torch.equal(value, state[name]) for name, value in loaded.gates.state_dict().items())

    with pytest.raises(ValueError, match=r"\(step 3\) is of another training"):
        train(mole_pipeline(), settings, clip, work=tmp_path / "work", prompts=PROMPTS[:1])


def test_clip_reads_the_words_it_knows(clip: DifferentiableCLIP) -> None:
    """The guidance compares the picture with what its own prompt has in `clip_prompts`, or with that prompt."""
    losses: list[float] = []

    def note(step: int, terms: Mapping[str, float]) -> None:
        losses.append(terms["clip"])

    seed = next(s for s in range(99) if int(torch.randint(2, (1,), generator=step_generator(s, 0))) == 1)
    for clip_prompts in ({PROMPTS[0]: "x", PROMPTS[1]: "a red mug"}, {PROMPTS[0]: "x", PROMPTS[1]: PROMPTS[1]}, None):
        train(mole_pipeline(), config(steps=1, seed=seed), clip, clip_prompts=clip_prompts, on_step_end=note)
    assert losses[0] != losses[1]
    assert losses[1] == losses[2]


def test_a_nan_stops_with_the_number_of_the_step(clip: DifferentiableCLIP, tmp_path: Path) -> None:
    pipe = mole_pipeline()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(TrainingDivergedError, match=r"stopped at step 1: loss = nan, clip = nan\."):
        train(pipe, config(), clip, out=tmp_path / "gates")
    assert list(tmp_path.iterdir()) == []
