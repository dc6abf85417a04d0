"""`train_lora`: settings, the diffusion it trains on, resuming, the base left as it was, and a LoRA that learned."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, ScoreSdeVeScheduler
from PIL import Image
from torch import Tensor

from mole_diffusion.families.stable_diffusion import StableDiffusion
from mole_diffusion.lora import inspect_lora
from mole_diffusion.training import TEXT_ENCODER_TARGETS, LoRATrainingConfig, TrainingDivergedError, train_lora
from mole_diffusion.training.engine.noise import NoiseSchedule
from mole_diffusion.training.engine.randomness import step_generator
from mole_diffusion.training.lora.data import TrainingData, groups_by_size
from mole_diffusion.training.lora.trainable import TrainableLoRA
from tests.tiny import tiny_pipeline

COLOURS = ("red", "green", "blue")


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (32, 32), colour) for colour in COLOURS]


def config(**changes: Any) -> LoRATrainingConfig:
    settings: dict[str, Any] = {"prompts": ("a cat",), "rank": 2, "steps": 4, "batch_size": 1, "warmup_steps": 1}
    return LoRATrainingConfig(**(settings | changes))


def train(pipe: Any, settings: LoRATrainingConfig, **options: Any) -> dict[str, Any]:
    return train_lora(pipe, pictures(), settings, progress=False, **options)


def flat(factors: dict[str, Any]) -> dict[str, Tensor]:
    return {
        f"{component}.{name}.{side}": getattr(pair, side)
        for component, modules in factors.items()
        for name, pair in modules.items()
        for side in ("down", "up")
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompts": ()}, ValueError, "either `captions` .* or `prompts` .* got 0 captions and 0 prompts"),
        ({"captions": ("a", "b")}, ValueError, "got 2 captions and 1 prompts"),
        ({"prompts": "a cat"}, TypeError, "`prompts` must be a sequence of strings, got the string 'a cat'"),
        ({"prompts": ("a cat", " ")}, ValueError, "is empty. Each must name the subject"),
        ({"triggers": ("<v1> cat",)}, ValueError, "'a cat' has none of `triggers`, '<v1> cat'. Give the words"),
        ({"triggers": ("",)}, ValueError, "'a cat' has none of `triggers`"),
        ({"triggers": "a cat"}, TypeError, "`triggers` must be a sequence"),
        ({"denoiser_targets": ()}, ValueError, "there is nothing to train"),
        ({"denoiser_targets": "to_q"}, TypeError, "`denoiser_targets` must be a sequence"),
        ({"rank": 0}, ValueError, "`rank` must be at least 1, got 0"),
        ({"rank": 4.0}, ValueError, r"`rank` must be of type int, such as 8, got 4\.0"),
        ({"rank": True}, ValueError, "`rank` must be of type int"),
        ({"alpha": "8"}, ValueError, "`alpha` must be of type float or None, got '8'"),
        ({"horizontal_flip": 1}, ValueError, "`horizontal_flip` must be of type bool"),
        ({"resolution": 64.0}, ValueError, "`resolution` must be of type int or None, got 64"),
        ({"seed": -1}, ValueError, "`seed` must be 0 or more, and less than .*, got -1"),
        ({"alpha": -1.0}, ValueError, "`alpha` must be positive .* got -1.0"),
        ({"resolution": 4}, ValueError, "`resolution` must be a multiple of 8 pixels"),
        ({"resolution": 63}, ValueError, "`resolution` must be a multiple of 8 pixels"),
        ({"resolution": 10**8}, ValueError, "`resolution` must be at most 16384 pixels, got 100000000"),
        ({"steps": 10**30}, ValueError, "`steps` must be at most 1,000,000,000, got 1000000"),
        ({"resolution": "own"}, ValueError, "`resolution` must be a number of pixels, None or \"native\", got 'own'"),
        ({"steps": 0}, ValueError, "`steps` must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1, got 0"),
        ({"warmup_steps": 4}, ValueError, r"`warmup_steps` \(4\) must be fewer than `steps` \(4\)"),
        ({"checkpoint_every": -1}, ValueError, "`checkpoint_every` must be 0"),
        ({"learning_rate": float("nan")}, ValueError, "`learning_rate` must be positive and finite, got nan"),
        ({"learning_rate": 1e-60}, ValueError, "`learning_rate` must be at least 1e-12"),  # the LoRA would be zero
        ({"max_grad_norm": 0.0}, ValueError, "`max_grad_norm` must be positive"),
        ({"weight_decay": -0.1}, ValueError, "`weight_decay` must be 0 or more, got -0.1"),
        ({"mixed_precision": "fp8"}, ValueError, '"no", "fp16" or "bf16", got \'fp8\''),
    ],
)
def test_settings_that_cannot_be_say_why(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": (), "captions": ("a cat",)}, "1 captions for 3 images"),
        ({"denoiser_targets": ("to_q", "to_x")}, r"unet \(UNet2DConditionModel\) has no module named \['to_x'\]"),
        ({"denoiser_targets": ("attn1",)}, r"is down_blocks.*attn1, a Attention"),
        (
            {"text_encoder_2_targets": ("fc1",)},
            r"text_encoder_2 of Stable Diffusion 1\.x or 2\.x is none that LoRAs are for",
        ),
        ({"rank": 600}, r"rank 600 is more than unet\..* can have, a module of .* outputs: at most 512"),
        ({"mixed_precision": "fp16"}, "needs a GPU, and the pipeline is on the CPU"),
    ],
)
def test_settings_that_do_not_fit_say_why(pipe: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(pipe, config(**changes))


def test_pipelines_that_cannot_be_trained_say_why(pipe: Any) -> None:
    with pytest.raises(ValueError, match="`images` is empty"):
        train_lora(pipe, [], config(), progress=False)
    pipe.experts = object()
    with pytest.raises(ValueError, match=r"has LoRAs loaded.*unload_loras"):
        train(pipe, config())
    pipe.experts = None
    pipe.unet.to(torch.float16)
    with pytest.raises(ValueError, match="base is in float16"):
        train(pipe, config())
    pipe.unet.to(torch.float32)
    pipe.scheduler = ScoreSdeVeScheduler()
    with pytest.raises(ValueError, match="ScoreSdeVeScheduler has no `alphas_cumprod`"):
        train(pipe, config())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_noise_and_target_are_the_schedulers(scheduler_class: Any, prediction_type: str, zero_snr: bool) -> None:
    settings = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
    schedule = NoiseSchedule.from_scheduler(scheduler_class(**settings))
    reference = DDIMScheduler(**settings)
    clean, noise = torch.randn(2, 3, 4, 2, 2)
    timesteps = torch.tensor([0, 500, 998])
    noisy = schedule.add_noise(clean, noise, timesteps)
    target = schedule.target(clean, noise, timesteps)
    torch.testing.assert_close(noisy, reference.add_noise(clean, noise, timesteps))
    velocity = reference.get_velocity(clean, noise, timesteps)
    torch.testing.assert_close(target, noise if prediction_type == "epsilon" else velocity)
    torch.testing.assert_close(schedule.predict_clean(target, noisy, timesteps), clean, rtol=1e-3, atol=1e-2)


def test_epsilon_without_signal_gives_no_clean_picture() -> None:
    schedule = NoiseSchedule.from_scheduler(DDIMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="zero SNR says nothing about the clean picture"):
        schedule.predict_clean(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.tensor([999]))


def test_the_same_training_gives_the_same_lora_in_one_go_or_in_two(tmp_path: Path) -> None:
    settings = config(checkpoint_every=2, text_encoder_targets=TEXT_ENCODER_TARGETS, horizontal_flip=True)
    whole = flat(train(tiny_pipeline(), settings))

    def cut(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_pipeline(), settings, work=tmp_path, on_step_end=cut)
    steps: list[int] = []
    resumed = flat(train(tiny_pipeline(), settings, work=tmp_path, on_step_end=lambda step, loss: steps.append(step)))
    assert steps == [3, 4]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "step-0000004.safetensors"]

    other_seed = flat(train(tiny_pipeline(), config(text_encoder_targets=TEXT_ENCODER_TARGETS, seed=1)))
    assert not all(torch.equal(whole[name], other_seed[name]) for name in whole)


def test_every_step_and_every_seed_draws_its_own_numbers() -> None:
    drawn = {key: torch.rand((), generator=step_generator(*key)).item() for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert len(set(drawn.values())) == 4
    assert torch.rand((), generator=step_generator(1, 0)).item() == drawn[1, 0]


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    train(tiny_pipeline(), config(steps=2), work=tmp_path)
    for other in (
        lambda: train(tiny_pipeline(), config(steps=2, seed=1), work=tmp_path),
        lambda: train(tiny_pipeline(seed=1), config(steps=2), work=tmp_path),
        lambda: train_lora(tiny_pipeline(), pictures()[:2], config(steps=2), work=tmp_path, progress=False),
    ):
        with pytest.raises(ValueError, match=r"\(step 2\) is of another training"):
            other()


@pytest.mark.parametrize("fails", [False, True])
def test_the_base_is_left_as_it_was(pipe: Any, fails: bool) -> None:
    models = [pipe.unet, pipe.text_encoder, pipe.vae]
    pipe.vae.requires_grad_(False)
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]

    def stop(step: int, loss: float) -> None:
        if fails:
            raise RuntimeError("stop")

    settings = config(text_encoder_targets=("q_proj",), steps=2)
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            train(pipe, settings, on_step_end=stop)
    else:
        train(pipe, settings, on_step_end=stop)
    for model, state in zip(models, before, strict=True):
        after = model.state_dict()
        assert after.keys() == state.keys()
        assert all(torch.equal(after[name], state[name]) for name in state)
        assert not any(module._forward_hooks for module in model.modules())
        assert all(parameter.requires_grad == (model is not pipe.vae) for parameter in model.parameters())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_nan_stops_with_the_number_of_the_step(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match=r"stopped at step [2-9]: loss = (nan|inf)"):
        train(pipe, config(steps=9, learning_rate=1e30), out=tmp_path / "broken.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_bf16_trains_fp32_factors(pipe: Any) -> None:
    for tensor in flat(train(pipe, config(mixed_precision="bf16", steps=2))).values():
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()


@pytest.mark.parametrize("flip", [False, True])
def test_each_picture_meets_its_own_caption(pipe: Any, monkeypatch: pytest.MonkeyPatch, flip: bool) -> None:
    settings = config(prompts=(), captions=COLOURS, batch_size=5, horizontal_flip=flip)
    [(numbers, pixels)] = groups_by_size(pictures(), 32, 2)
    data = TrainingData(pipe, StableDiffusion(), [(numbers, pixels)], settings)
    [(numbers, mean, std)] = data._groups
    monkeypatch.setattr(data, "_groups", [(numbers, mean, torch.zeros_like(std))])
    latents, (prompt_embeds, _) = data.sample(torch.Generator().manual_seed(0))
    with torch.no_grad():
        clean = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        captions = pipe.encode_prompt(list(COLOURS), "cpu", 1, False)[0]
    # Pictures of one colour are their own mirror image but for what the encoder's padding does at the border.
    middle = (..., slice(6, 10), slice(6, 10))
    by_picture = torch.cdist(latents[middle].flatten(1), clean[middle].flatten(1)).argmin(1)
    by_caption = torch.cdist(prompt_embeds.flatten(1), captions.flatten(1)).argmin(1)
    assert by_picture.tolist() == by_caption.tolist()
    assert set(by_picture.tolist()) == {0, 1, 2}


def test_pictures_of_their_own_sizes_come_in_batches_of_one_size(pipe: Any) -> None:
    images = [Image.new("RGB", size) for size in ((32, 32), (48, 33), (32, 32))]
    settings = config(prompts=(), captions=COLOURS, batch_size=2, resolution="native")
    groups = groups_by_size(images, "native", 2)
    assert [(numbers.tolist(), tuple(pixels.shape)) for numbers, pixels in groups] == [
        ([0, 2], (2, 3, 32, 32)),
        ([1], (1, 3, 32, 48)),  # to whole latents
    ]
    data = TrainingData(pipe, StableDiffusion(), groups, settings)
    captions = pipe.encode_prompt(list(COLOURS), "cpu", 1, False)[0]
    sides = []
    for seed in range(30):
        latents, (prompt_embeds, _) = data.sample(torch.Generator().manual_seed(seed))
        sides.append(latents.shape[-1])
        said = torch.cdist(prompt_embeds.flatten(1), captions.flatten(1)).argmin(1).tolist()
        assert set(said) == ({0, 2} if sides[-1] == 16 else {1})
    assert 10 <= sides.count(16) < 30
    train_lora(pipe, images, settings, progress=False)
    with pytest.raises(ValueError, match="A picture of 40×3 pixels is too small to train on"):
        groups_by_size([Image.new("RGB", (40, 3))], "native", 2)


def test_what_is_trained_is_what_stock_diffusers_loads(tmp_path: Path) -> None:
    """Scaling other than one, a 1x1 convolution and the text encoder included."""
    from mole_diffusion.lora import save_lora

    pipe = tiny_pipeline()
    targets = {"unet": ("to_q", "to_out.0", "ff.net.2", "proj_in"), "text_encoder": ("k_proj", "fc2")}
    lora = TrainableLoRA({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, targets, rank=2, alpha=3.0, seed=0)
    for _, layer in lora.layers.values():
        torch.nn.init.normal_(layer.up, std=0.3)
    sample, timestep = torch.randn(1, 4, 16, 16), torch.tensor([500])

    @torch.no_grad()
    def output() -> Tensor:
        embeds = pipe.encode_prompt(["a cat"], "cpu", 1, False)[0]
        return pipe.unet(sample, timestep, encoder_hidden_states=embeds).sample

    base = output()
    with lora.attached():
        ours = output()
    save_lora(lora.factors(), tmp_path / "lora.safetensors")
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    assert (ours - base).abs().max() > 1e-2
    torch.testing.assert_close(ours, output(), rtol=1e-4, atol=1e-4)


def test_a_trained_lora_lowers_the_loss_of_its_pictures(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    settings = config(steps=15, batch_size=3, learning_rate=2e-2, rank=4)
    [(_, images)] = groups_by_size(pictures(), 32, 2)
    noise, timesteps = torch.randn(3, 4, 16, 16), torch.tensor([200, 500, 800])

    @torch.no_grad()
    def loss() -> float:
        latents = pipe.vae.encode(images).latent_dist.mean * pipe.vae.config.scaling_factor
        embeds = pipe.encode_prompt(["a cat"] * 3, "cpu", 1, False)[0]
        noisy = pipe.scheduler.add_noise(latents, noise, timesteps)
        return (pipe.unet(noisy, timesteps, encoder_hidden_states=embeds).sample - noise).square().mean().item()

    before = loss()
    train(pipe, settings, out=tmp_path / "cat.safetensors")
    assert loss() == before
    pipe.load_lora_weights(tmp_path / "cat.safetensors")
    assert loss() < 0.9 * before


def test_the_saved_file_says_how_it_was_trained(pipe: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    train(pipe, config(steps=2, triggers=("a Cat",)), out=tmp_path / "cat.safetensors")
    with safe_open(tmp_path / "cat.safetensors", "pt") as file:
        assert re.search(r'"prompts": \["a cat"\].*"rank": 2', file.metadata()["mole_diffusion.training"])
    assert inspect_lora(tmp_path / "cat.safetensors").triggers == ("a Cat",)
