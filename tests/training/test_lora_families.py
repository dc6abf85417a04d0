"""`train_lora` on every family: its own latents, noise, targets and conditions, and a LoRA that its pipelines load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline, StableDiffusionXLPipeline
from PIL import Image

from mole_diffusion.errors import MoLEError
from mole_diffusion.families import family_of
from mole_diffusion.lora import load_lora
from mole_diffusion.training import TEXT_ENCODER_TARGETS, LoRATrainingConfig, train_lora
from mole_diffusion.training.engine.flow import FlowSchedule
from mole_diffusion.training.engine.schedule import schedule_of
from tests.tiny import dits, families, tiny_pipeline

FAMILIES = (
    "stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "flux2", "z_image", "krea2", "qwen_image",
)  # fmt: skip
WITH_CLIPS = {
    "stable_diffusion": ("text_encoder",),
    "stable_diffusion_xl": ("text_encoder", "text_encoder_2"),
    "stable_diffusion_3": ("text_encoder", "text_encoder_2"),
    "flux": ("text_encoder",),  # the second is a T5
}


def pipeline(name: str) -> Any:
    """A stock pipeline of a family."""
    if name == "stable_diffusion":
        return tiny_pipeline()
    if name == "stable_diffusion_xl":
        return StableDiffusionXLPipeline(**families.sdxl())
    if name == "stable_diffusion_3":
        return StableDiffusion3Pipeline(**families.sd3())
    pipe = dits.tiny_dit(name)
    pipe.default_sample_size = dits.SIZE // pipe.vae_scale_factor  # latent pixels; stock, 128 for pictures of 1024
    return pipe


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipe(name: str) -> Any:
    found = pipeline(name)
    found.set_progress_bar_config(disable=True)
    return found


def pictures() -> list[Image.Image]:
    return [Image.linear_gradient("L").resize((32, 32)).convert("RGB"), Image.new("RGB", (32, 32), "red")]


def config(**changes: Any) -> LoRATrainingConfig:
    settings = {"prompts": ("a cat", "a photo of a red cat"), "rank": 2, "steps": 2, "batch_size": 2, "warmup_steps": 0}
    return LoRATrainingConfig(**{**settings, **changes})


@torch.no_grad()
def test_latents_are_what_the_picture_is_made_of(pipe: Any) -> None:
    """`latents` of what the autoencoder gave, decoded by `picture`, is that decoded by the autoencoder itself."""
    family = family_of(pipe.components)
    torch.manual_seed(0)
    given = torch.rand(2, 3, family.side(pipe), family.side(pipe)) * 2 - 1
    mean, deviation = family.distribution(pipe, given)
    assert mean.shape == deviation.shape
    latents = family.latents(pipe, mean)
    assert latents.shape == (2, *family.latent_shape(pipe))
    video = hasattr(pipe.vae.config, "z_dim")  # one frame of it
    decoded = pipe.vae.decode(mean.unsqueeze(2) if video else mean, return_dict=False)[0]
    torch.testing.assert_close(
        family.picture(pipe, latents), decoded[:, :, 0] if video else decoded, atol=1e-4, rtol=1e-4
    )


def test_a_lora_is_trained_and_read(name: str, pipe: Any, tmp_path: Path) -> None:
    family = family_of(pipe.components)
    clips = WITH_CLIPS.get(name, ())
    before = {key: value.clone() for key, value in getattr(pipe, family.denoiser).state_dict().items()}
    settings = config(text_encoder_targets=TEXT_ENCODER_TARGETS if clips else ())
    losses: list[float] = []
    train_lora(pipe, pictures(), settings, out=tmp_path / "it.safetensors", progress=False,
               on_step_end=lambda step, loss: losses.append(loss))  # fmt: skip
    assert len(losses) == 2
    after = getattr(pipe, family.denoiser).state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    factors = load_lora(tmp_path / "it.safetensors", pipe.components).factors
    assert set(factors) == {family.denoiser, *clips}
    trained = {part for part in family.architectures[family.denoiser].targets
               if any(module.endswith(part) for module in factors[family.denoiser])}  # fmt: skip
    assert trained == set(family.architectures[family.denoiser].targets)
    for component, modules in factors.items():
        assert any(one.up.any() for one in modules.values()), component
    if name not in ("flux2", "z_image", "krea2", "qwen_image"):
        pipe.load_lora_weights(tmp_path, weight_name="it.safetensors")
        for component in factors:
            assert getattr(pipe, component).peft_config, component
        pipe.unload_lora_weights()


def test_a_text_encoder_that_takes_no_lora_is_refused(name: str, pipe: Any) -> None:
    if name in WITH_CLIPS:
        return
    with pytest.raises(MoLEError, match=r"`text_encoder_targets`: the text_encoder of .* is none that LoRAs are for"):
        train_lora(pipe, pictures(), config(text_encoder_targets=("q_proj",)), progress=False)


def test_rows_of_patches_are_of_squares(name: str, pipe: Any) -> None:
    images = [Image.new("RGB", (32, 48), "red")]
    if len(family_of(pipe.components).latent_shape(pipe)) == 3:
        train_lora(pipe, images, config(steps=1, resolution="native"), progress=False)
    else:
        with pytest.raises(MoLEError, match=r"is given latents as a row of patches, of squares only here"):
            train_lora(pipe, images, config(resolution="native"), progress=False)


def test_no_picture_is_cut_in_silence(name: str, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "vae_scale_factor", 16)
    tokens = 16 * family_of(pipe.components).patch
    with pytest.raises(
        MoLEError,
        match=f"have sides that are multiples of {tokens} pixels, got 40. Try {40 // tokens * tokens or tokens}",
    ):
        train_lora(pipe, pictures(), config(resolution=40), progress=False)


def test_flow_matching_is_that_of_the_scheduler() -> None:
    """Noise as `scale_noise` adds it; from the target, its own step leads to the clean latents."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = schedule_of(scheduler)
    assert isinstance(schedule, FlowSchedule)
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 2, 4, 3, 3)
    scheduler.set_timesteps(7)
    timesteps = scheduler.timesteps[[1, 6]]
    noisy = schedule.add_noise(clean, noise, timesteps)
    torch.testing.assert_close(noisy, scheduler.scale_noise(clean, timesteps, noise))
    target = schedule.target(clean, noise, timesteps)
    scheduler.set_begin_index(6)
    torch.testing.assert_close(scheduler.step(target[1:], timesteps[1], noisy[1:])[0], clean[1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(schedule.predict_clean(target, noisy, timesteps), clean, atol=1e-5, rtol=1e-5)


def test_noise_levels_are_drawn_as_a_call_visits_them() -> None:
    """Of 1000 steps of a call each is drawn alike: ranks of the draws are even along its timesteps."""
    schedule = FlowSchedule(1000, 3.0)
    drawn = schedule.draw(4000, torch.Generator().manual_seed(0))
    steps = torch.tensor(schedule.trailing_timesteps(10))  # falling, from 1000
    assert drawn.max() <= 1000
    assert drawn.min() > 0
    for index, timestep in enumerate(steps.tolist()):
        assert float((drawn > timestep).float().mean()) == pytest.approx(index / 10, abs=0.03)


@torch.no_grad()
def test_stable_diffusion_xl_is_told_the_size_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("stable_diffusion_xl")
    told = []
    monkeypatch.setattr(
        pipe.unet,
        "forward",
        lambda *args, _run=pipe.unet.forward, **given: (told.append(given), _run(*args, **given))[1],
    )
    family = family_of(pipe.components)
    conditions = family.conditions(pipe, ["a cat"])
    family.predict(pipe, torch.randn(1, 4, 8, 16), torch.tensor([500]), conditions)
    pipe("a cat", height=16, width=32, num_inference_steps=1, guidance_scale=1.0)
    ours, theirs = (given["added_cond_kwargs"] for given in told)
    assert ours["time_ids"].tolist() == theirs["time_ids"].tolist() == [[16, 32, 0, 0, 16, 32]]
    torch.testing.assert_close(ours["text_embeds"], theirs["text_embeds"])


def test_either_encoder_of_two_may_be_trained_alone(tmp_path: Path) -> None:
    pipe = pipeline("stable_diffusion_xl")
    for targets, components in (
        ({"text_encoder_targets": ("fc1",), "text_encoder_2_targets": ()}, {"unet", "text_encoder"}),
        ({"denoiser_targets": (), "text_encoder_2_targets": ("fc1",)}, {"text_encoder_2"}),
    ):
        assert set(train_lora(pipe, pictures(), config(**targets), progress=False)) == components


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "stable_diffusion_3"])
def test_training_lowers_the_loss_of_its_pictures(name: str, tmp_path: Path) -> None:
    """Of a stock pipeline with the LoRA, at noise that the training did not see, against the scheduler's own noise."""
    pipe = pipeline(name)
    family = family_of(pipe.components)
    generator = torch.Generator().manual_seed(7)
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
    noise = torch.randn(3, *family.latent_shape(pipe), generator=generator)
    if name == "stable_diffusion_3":
        timesteps = pipe.scheduler.timesteps[[200, 500, 800]]
    else:
        timesteps = torch.tensor([200, 500, 800])

    @torch.no_grad()
    def loss() -> float:
        vae = pipe.vae
        latents = (vae.encode(pixels).latent_dist.mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        if name == "stable_diffusion_3":
            noisy, wanted = pipe.scheduler.scale_noise(latents, timesteps, noise), noise - latents
        else:
            noisy, wanted = pipe.scheduler.add_noise(latents, noise, timesteps), noise
        told = family.conditions(pipe, ["a cat"] * 3)
        return float((family.predict(pipe, noisy, timesteps, told) - wanted).square().mean())

    before = loss()
    settings = config(
        denoiser_targets=("conv_out",) if name == "stable_diffusion_xl" else ("norm_out.linear", "proj_out"),
        steps=40, batch_size=3, rank=4, learning_rate=3e-2, prompts=("a cat",),
    )  # fmt: skip
    train_lora(pipe, images, settings, out=tmp_path / "it.safetensors", progress=False)
    assert loss() == before
    pipe.load_lora_weights(tmp_path, weight_name="it.safetensors")
    assert loss() < 0.9 * before
