"""Other latents for the toybox's base, compared by its oracle: `python benchmarks/toybox_latents.py START`.

Every way has an autoencoder made from the one that ships: with fewer channels, those along which latents are largest,
or so trained on that a latent of half the size shows the picture at half the size (scale-equivariant, after EQ-VAE,
https://arxiv.org/abs/2502.09509). A denoiser that draws already gets its first and last layer turned to these latents,
and is trained on for so many steps, which take as long in each way. Then the oracle counts as `toybox_recipes.py` does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from drawn import shown_of_three

from mole_diffusion import toybox
from mole_diffusion.drawing.opening import pick_device
from mole_diffusion.files import write_json
from mole_diffusion.tables import markdown_table, number
from mole_diffusion.toybox.recipe.base import load_base, make_unet, train_base
from mole_diffusion.toybox.recipe.loop import AveragedWeights, decline, run_stage
from mole_diffusion.toybox.recipe.measure_oracle import measure_oracle
from mole_diffusion.toybox.recipe.tokenizer import make_tokenizer
from mole_diffusion.toybox.recipe.vae import KL_WEIGHT, LATENT_CHANNELS, load_vae, make_vae, note_scale, render_batch


class Way(NamedTuple):
    """Channels of the latents, and whether half a latent is to be half a picture."""

    channels: int = LATENT_CHANNELS
    equivariant: bool = False


WAYS = {
    "as they are": Way(),
    "scale-equivariant": Way(equivariant=True),
    "six channels": Way(6),
    "four channels": Way(4),
}


@torch.no_grad()
def directions(vae: AutoencoderKL, channels: int) -> torch.Tensor:
    """Along which latents are largest: `(channels, all channels)`, orthonormal rows."""
    if channels == LATENT_CHANNELS:
        return torch.eye(channels)
    mean = vae.encode(render_batch((0, "latents", 0), 256)).latent_dist.mean.movedim(1, 0).flatten(1)
    return torch.linalg.eigh(mean @ mean.T).eigenvectors.flip(1)[:, :channels].T.contiguous()


@torch.no_grad()
def turned(vae: AutoencoderKL, along: torch.Tensor) -> AutoencoderKL:
    """The same autoencoder with the latents' parts along some directions alone."""
    new = AutoencoderKL.from_config(make_vae().config, latent_channels=len(along))
    shapes = {name: tensor.shape for name, tensor in new.state_dict().items()}
    kept = {name: tensor for name, tensor in vae.state_dict().items() if tensor.shape == shapes[name]}
    new.load_state_dict(kept, strict=False)
    both = torch.block_diag(along, along.square())  # a direction is as uncertain as the channels it is made of
    quant, last = both @ vae.quant_conv.weight.flatten(1), vae.encoder.conv_out
    new.encoder.conv_out.weight.copy_(torch.einsum("ab,b...->a...", quant, last.weight))
    new.encoder.conv_out.bias.copy_(quant @ last.bias + both @ vae.quant_conv.bias)
    back, first = vae.post_quant_conv.weight.flatten(1) @ along.T, vae.decoder.conv_in
    new.decoder.conv_in.weight.copy_(torch.einsum("ab...,bc->ac...", first.weight, back))
    new.decoder.conv_in.bias.copy_(first.bias + first.weight.sum(dim=(2, 3)) @ vae.post_quant_conv.bias)
    for layer in (new.quant_conv, new.post_quant_conv):
        layer.weight.copy_(torch.eye(layer.out_channels)[..., None, None])
        layer.bias.zero_()
    return new


def train_autoencoder(vae: AutoencoderKL, way: Way, folder: Path, steps: int, device: torch.device) -> AutoencoderKL:
    """Trains encoder and decoder on, and measures the latents' standard deviation anew."""
    vae = vae.to(device).train().requires_grad_(True)

    def step(batch: tuple[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        k, pictures = batch[0], batch[1].to(device)
        posterior = vae.encode(pictures).latent_dist
        latents = posterior.sample(generator=torch.Generator(device).manual_seed(k))
        error = (vae.decode(latents).sample - pictures).square().mean()
        kl = posterior.kl().mean() / latents[0].numel()
        loss = error + KL_WEIGHT * kl
        if way.equivariant:
            half = vae.decode(F.avg_pool2d(latents, 2)).sample
            loss = loss + (half - F.avg_pool2d(pictures, 2)).square().mean()
        return {"loss": loss, "error": error.detach()}

    run_stage(
        "vae",
        vae,
        torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0),
        lambda k: (k, render_batch((0, "latents", 1 + k), 32)),
        step,
        device=device,
        num_steps=steps,
        schedule=decline,
        work_dir=folder,
        seed=0,
        average=AveragedWeights(vae, 0.99),
    )
    vae.eval().requires_grad_(False)
    note_scale(vae, render_batch((0, "latents", 0), 256).to(device))
    return vae


@torch.no_grad()
def with_turned_ends(unet: UNet2DConditionModel, along: torch.Tensor, larger: float) -> UNet2DConditionModel:
    """The same denoiser for the latents' parts along some directions, whose numbers were so much larger before."""
    new = UNet2DConditionModel.from_config(make_unet().config, in_channels=len(along), out_channels=len(along))
    shapes = {name: tensor.shape for name, tensor in new.state_dict().items()}
    kept = {name: tensor for name, tensor in unet.state_dict().items() if tensor.shape == shapes[name]}
    new.load_state_dict(kept, strict=False)
    new.conv_in.weight.copy_(torch.einsum("ab...,cb->ac...", unet.conv_in.weight, along) * larger)
    new.conv_out.weight.copy_(torch.einsum("ab,b...->a...", along, unet.conv_out.weight) / larger)
    new.conv_out.bias.copy_(along @ unet.conv_out.bias / larger)
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("start", type=Path, help="folder with a trained unet/ and text_encoder/ to go on from")
    parser.add_argument(
        "--steps", type=int, default=193, help="of training the denoiser, which take as long in each way"
    )
    parser.add_argument("--vae-steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--scenes", type=int, default=10240)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("outputs/toybox_latents"))
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()

    device, tokenizer = pick_device(given.device), make_tokenizer()

    table = []
    for name in given.ways:
        way, folder = WAYS[name], given.out / name.replace(" ", "_")
        row = folder / "row.json"
        if not row.exists():
            vae = load_vae(toybox.base_dir() / "vae")
            before, along = vae.config["scaling_factor"], directions(vae, way.channels)
            if way.channels < LATENT_CHANNELS:
                vae = turned(vae, along)
            if way.channels < LATENT_CHANNELS or way.equivariant:
                vae = train_autoencoder(vae, way, folder, given.vae_steps, device)
            vae = vae.to(device)
            unet, text_encoder = load_base(given.start, tokenizer)
            unet = train_base(
                vae,
                text_encoder,
                tokenizer,
                folder,
                seed=0,
                device=device,
                num_steps=given.steps,
                batch_size=given.batch,
                num_scenes=given.scenes,
                start=with_turned_ends(unet, along, before / vae.config["scaling_factor"]),
            )
            parts = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
            pipe = StableDiffusionPipeline.from_pretrained(toybox.base_dir(), **parts).to(device)
            looks = measure_oracle(vae, num_scenes=200)["looks"]
            write_json(row, {"looks": looks, **shown_of_three(pipe, given.pictures)})
        found = json.loads(row.read_text())
        rates = [number(100 * found[key], 1) for key in ("looks", "presence", "all three", "three classes")]
        table.append([name, *rates])
        print(f"{name}: {found}", flush=True)
    headings = ["latents", "looks through the autoencoder, %", "presence, %", "all three, %", "three classes, %"]
    print(markdown_table(headings, table))


if __name__ == "__main__":
    main()
