"""What a composition method costs beside a plain sum: `python benchmarks/overhead.py`.

One process, sides interleaved round by round, processor time (which other processes disturb less than the clock).
Every ratio is of one round; the table has their quartiles. Random weights: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from mole_diffusion.composition import COMPOSITIONS, Call, Composition, Masks, RegionMap
from mole_diffusion.composition.prompt import PromptWords
from mole_diffusion.experts import Experts
from mole_diffusion.lora import LoRA, LoRAFactors

SIZES: dict[str, dict[str, Any]] = {
    "small": {"block_out_channels": (64, 128, 160), "attention_head_dim": 32, "norm_num_groups": 16, "width": 128},
    "142m": {"block_out_channels": (128, 256, 512, 512), "attention_head_dim": 8, "norm_num_groups": 32, "width": 768},
}
TARGETS = ("attn1.to_", "attn2.to_", ".ff.net.", "proj_in", "proj_out")
NAMES = ("a", "b", "c")
LATENT, TOKENS = {"small": 16, "142m": 32}, 32


def model(size: str) -> UNet2DConditionModel:
    settings = dict(SIZES[size])
    width = settings.pop("width")
    levels = len(settings["block_out_channels"])
    return UNet2DConditionModel(
        sample_size=LATENT[size],
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
        cross_attention_dim=width,
        **settings,
    ).eval()


def random_loras(unet: UNet2DConditionModel, rank: int) -> list[LoRA]:
    modules = {
        name: module
        for name, module in unet.named_modules()
        if any(target in name for target in TARGETS) and hasattr(module, "weight")
    }
    loras = []
    for name in NAMES:
        factors = {}
        for place, module in modules.items():
            shape = module.weight.shape
            up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2)) / 100
            factors[place] = LoRAFactors(torch.randn(rank, *shape[1:]) / 10, up)
        loras.append(LoRA(name, "<random>", "diffusers", "", {"unet": factors}))
    return loras


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="142m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)

    unet = model(given.size)
    experts = Experts(random_loras(unet, given.rank))
    experts.attach({"unet": unet})
    latent, width = LATENT[given.size], unet.config.cross_attention_dim
    inputs = torch.randn(2, 4, latent, latent), torch.tensor(100), torch.randn(2, TOKENS, width)
    owned = torch.zeros(1, len(NAMES), TOKENS, dtype=torch.bool)
    for index in range(len(NAMES)):
        owned[0, index, 4 + 4 * index : 6 + 4 * index] = True
    columns = {name: (index / 3, 0, (index + 1) / 3, 1) for index, name in enumerate(NAMES)}
    regions = RegionMap.from_regions(columns, NAMES, image_size=(latent, latent), grid=(latent, latent))

    def call() -> Call:
        words = PromptWords(owned)
        words.encoded(inputs[2][1:])
        steps = SimpleNamespace(timesteps=torch.arange(1000, 0, -100), order=1)
        return Call(NAMES, ("subject",) * len(NAMES), steps, words=words, regions=regions)

    sides: dict[str, Composition] = {
        name: COMPOSITIONS[name]() for name in ("linear", "masks", "norm_router", "budget")
    }
    sides["masks, no attention bias"] = Masks(given_own_words=0.0, given_others_words=0.0)
    calls = {name: call() for name in sides}

    def seconds(method: Composition | None, name: str = "") -> float:
        with (
            torch.no_grad(),
            experts.using(
                keep=torch.full((1, len(NAMES)), float(method is not None)), weigher=method, call=calls.get(name)
            ),
        ):
            begin = time.process_time()
            unet(*inputs)
            return time.process_time() - begin

    rounds: dict[str, list[float]] = {name: [] for name in ("base", *sides)}
    for number in range(given.rounds + 1):
        spent = {"base": seconds(None)} | {name: seconds(method, name) for name, method in sides.items()}
        if number:  # the first warms up
            for name, value in spent.items():
                rounds[name].append(value)
    print(
        f"{given.size}: {sum(p.numel() for p in unet.parameters()) / 1e6:.0f} M parameters, latents {latent}², batch 2,"
    )
    print(f"3 LoRAs of rank {given.rank}, {given.rounds} rounds, processor time, quartiles")
    print(f"{'':28s}{'over the bare base':>24s}{'over a plain sum':>24s}")
    for name in sides:
        print(f"{name:28s}" + "".join(f"{ratio(rounds[name], rounds[other]):>24s}" for other in ("base", "linear")))


def ratio(side: list[float], other: list[float]) -> str:
    low, middle, high = np.quantile(np.array(side) / np.array(other), [0.25, 0.5, 0.75])
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
