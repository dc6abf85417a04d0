"""The toybox's autoencoder: 64×64 pixels to 8×16×16 latents, 80×80 to 8×20×20."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from mole_diffusion.training.engine.optimizer import learning_rate_factor

from ..render import render_array
from ..world import IMAGE_SIZE, random_scenes
from .loop import AveragedWeights, decline, run_stage, step_rng
from .precision import fast_autocast

LATENT_CHANNELS = 8
NUM_STEPS = 2600  # from nothing
KL_WEIGHT = 3e-4  # per latent element, against a mean squared error per pixel


def make_vae() -> AutoencoderKL:
    """An untrained autoencoder of the toybox."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
    )


def load_vae(folder: Path) -> AutoencoderKL:
    """A trained autoencoder, without the trace of its folder that `from_pretrained` leaves in the configuration."""
    trained = AutoencoderKL.from_pretrained(folder)
    vae = make_vae()
    vae.load_state_dict(trained.state_dict())
    vae.register_to_config(scaling_factor=trained.config["scaling_factor"])
    return vae.eval().requires_grad_(False)


def render_batch(rng_key: tuple[int, str, int], batch_size: int) -> torch.Tensor:
    """Random scenes of one side as pictures of shape `(batch, 3, side, side)`, values −1 to 1."""
    rng = step_rng(*rng_key)
    pictures = torch.stack([torch.from_numpy(render_array(scene)) for scene in random_scenes(rng, batch_size)])
    return pictures.permute(0, 3, 1, 2) * 2 - 1


def train_vae(
    work_dir: Path,
    *,
    seed: int,
    device: torch.device,
    num_steps: int,
    batch_size: int,
    start: AutoencoderKL | None = None,
) -> AutoencoderKL:
    """Trains on rendered scenes; mean squared error plus a light pull of the latents towards a unit Gaussian.

    The latents' standard deviation is measured at the end and stored as the model's scaling factor.

    Args:
        start: A trained autoencoder to go on from. Only its decoder learns, and the learning rate falls from the first
            step on: its latents stay, and so does what was trained on them.
    """
    torch.manual_seed(seed)
    vae = (make_vae() if start is None else start).to(device).train().requires_grad_(start is None)
    vae.decoder.requires_grad_(True)
    learning_rate, average_decay = (2e-3, 0.995) if start is None else (1e-3, 0.999)
    schedule = partial(learning_rate_factor, warmup_steps=100) if start is None else decline
    trained = vae if start is None else vae.decoder
    optimizer = torch.optim.AdamW(trained.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    average = AveragedWeights(trained, average_decay)

    def make_batch(k: int) -> tuple[int, torch.Tensor]:
        return k, render_batch((seed, "vae", k), batch_size)

    def step(batch: tuple[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        k, pictures = batch[0], batch[1].to(device)
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + k)
        with fast_autocast(device):
            posterior = vae.encode(pictures).latent_dist
            latents = posterior.sample(generator=generator)
            decoded = vae.decode(latents).sample
        error = (decoded.float() - pictures).square().mean()
        kl = posterior.kl().mean() / latents[0].numel()
        return {"loss": error + KL_WEIGHT * kl, "error": error.detach(), "kl": kl.detach()}

    run_stage(
        "vae" if start is None else "vae-on",
        trained,
        optimizer,
        make_batch,
        step,
        device=device,
        num_steps=num_steps,
        schedule=schedule,
        work_dir=work_dir,
        seed=seed,
        average=average,
    )
    vae.eval().requires_grad_(False)
    if start is not None:
        return vae
    note_scale(vae, render_batch((seed, "vae-scale", 0), 256).to(device))
    return vae


@torch.no_grad()
def note_scale(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Stores as the scaling factor what gives the latents of these pictures a standard deviation of 1."""
    latents = vae.encode(pictures).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
