"""Other ways to train the toybox's base, compared at equal time by its oracle: `python benchmarks/toybox_recipes.py`.

Each way trains a denoiser and a text encoder for so many minutes: a new denoiser beside the shipped text encoder, which
can read, or with `--start` those of a folder. Its number of steps is what fits into the time, and the learning rate
falls to zero within them. Then the oracle counts how many of three classes are there, and how many of three looks that
a prompt names in words: what a composition of three LoRAs is judged by. Stopped and started again, it goes on, except
with SOAP. From nothing, a GPU makes it worth reading; from weights that draw already, some minutes of a CPU core do.
Needs `pip install pytorch-optimizer`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from drawn import shown_of_three
from pytorch_optimizer import SOAP, Muon
from pytorch_optimizer.optimizer.utils import zero_power_via_newton_schulz_5
from torch import nn
from transformers import CLIPTextModel

from mole_diffusion import toybox
from mole_diffusion.drawing.opening import pick_device
from mole_diffusion.files import write_json
from mole_diffusion.tables import markdown_table, number
from mole_diffusion.toybox.recipe.base import BaseSettings, load_base, train_base
from mole_diffusion.toybox.recipe.precision import bfloat16_pays
from mole_diffusion.toybox.recipe.tokenizer import make_tokenizer
from mole_diffusion.toybox.recipe.vae import load_vae

AS_IT_IS = BaseSettings()


def muon(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Orthogonal steps for matrices and kernels, as long as AdamW's; AdamW for the rest."""
    if not bfloat16_pays(parameters[0].device):  # in which the library makes them orthogonal
        *others, _ = zero_power_via_newton_schulz_5.__defaults__
        zero_power_via_newton_schulz_5.__defaults__ = (*others, torch.float32)
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    orthogonal = {"params": matrices, "use_muon": True, "use_adjusted_lr": True, "weight_decay": 0.01}
    return Muon([orthogonal, {"params": others, "use_muon": False}], lr=learning_rate, adamw_lr=learning_rate)


class _TensorsOnly(SOAP):
    """SOAP with the part of its state that a checkpoint holds; its lists of matrices are left out.

    So a training with it cannot go on from a checkpoint: one that was stopped is to be started again in a new folder.
    """

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        tensors = {
            k: {name: value for name, value in entries.items() if isinstance(value, torch.Tensor)}
            for k, entries in state["state"].items()
        }
        return state | {"state": tensors}


def soap(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    return _TensorsOnly(
        parameters, lr=learning_rate, weight_decay=0.01, precondition_frequency=10, max_precondition_dim=512
    )


class Way(NamedTuple):
    """Settings of the training and samples in a batch."""

    settings: BaseSettings
    batch_size: int


def ways(batch_size: int, learning_rate: float) -> dict[str, Way]:
    """What is tried, beside what the recipe does: batches of `batch_size` at the highest rate `learning_rate`."""

    def changed(**settings: Any) -> Way:
        return Way(replace(AS_IT_IS, learning_rate=learning_rate, **settings), batch_size)

    return {
        "as it is": changed(),
        "Muon": changed(make_optimizer=muon),
        "SOAP": changed(make_optimizer=soap),
        "timesteps further towards the noise": changed(timestep_power=0.5),
        "timesteps even": changed(timestep_power=1.0),
        "timesteps towards the picture": changed(timestep_power=1.4),
        "learning rate doubled": Way(replace(AS_IT_IS, learning_rate=learning_rate * 2), batch_size),
        "twice the batch": Way(replace(AS_IT_IS, learning_rate=learning_rate * 2**0.5), batch_size * 2),
        "half the batch": Way(replace(AS_IT_IS, learning_rate=learning_rate / 2**0.5), batch_size // 2),
        "average over a shorter time": changed(average=0.99),
        "layout heads at two resolutions": changed(fine_layout=True),
        "no layout heads": changed(layout_weight=0.0),
        "learning rate halved": Way(replace(AS_IT_IS, learning_rate=learning_rate / 2), batch_size),
        "average over a longer time": changed(average=0.9997),
    }


def train(
    settings: BaseSettings,
    batch_size: int,
    steps: int,
    folder: Path,
    num_scenes: int,
    device: torch.device,
    start: Path | None,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Denoiser and text encoder, trained from those in `start`, or a new denoiser beside the shipped text encoder."""
    tokenizer, vae = make_tokenizer(), load_vae(toybox.base_dir() / "vae").to(device)
    unet, text_encoder = load_base(start or toybox.base_dir(), tokenizer)
    unet = train_base(
        vae,
        text_encoder,
        tokenizer,
        folder,
        seed=0,
        device=device,
        num_steps=steps,
        batch_size=batch_size,
        num_scenes=num_scenes,
        start=unet if start else None,
        settings=settings,
    )
    return unet, text_encoder


def step_seconds(settings: BaseSettings, batch_size: int, device: torch.device) -> float:
    """Time of a step: of the longer of two trainings beyond that of the shorter, after one to warm up.

    On a CPU its own time, so that what else the machine does counts little.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    taken = []
    for steps in (2, 2, 22):
        with TemporaryDirectory() as folder:
            begun = clock()
            train(settings, batch_size, steps, Path(folder), 320, device, None)
            taken.append(clock() - begun)
    return (taken[2] - taken[1]) / 20


def looked_at(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, device: torch.device, pictures: int
) -> dict[str, float]:
    """What the oracle finds in pictures of a denoiser."""
    pipe = StableDiffusionPipeline.from_pretrained(toybox.base_dir(), unet=unet, text_encoder=text_encoder).to(device)
    return shown_of_three(pipe, pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training for each way")
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--start", type=Path, help="folder with a trained unet/ and text_encoder/ to go on from")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--scenes", type=int, default=20480)
    parser.add_argument("--ways", nargs="+", choices=list(ways(2, 1.0)), help="some of them; without it all")
    parser.add_argument("--out", type=Path, default=Path("outputs/toybox_recipes"))
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()

    given.out.mkdir(parents=True, exist_ok=True)
    device = pick_device(given.device)
    tried = ways(given.batch, (7e-4 if given.start else 1e-3) * (given.batch / 32) ** 0.5)
    rows, seconds = {}, {}
    if given.start:
        rows["before"] = given.out / "before.json"
        if not rows["before"].exists():
            models = load_base(given.start, make_tokenizer())
            write_json(rows["before"], {"steps": 0, "samples": 0, **looked_at(*models, device, given.pictures)})
    for name in given.ways or tried:
        way = tried[name]
        folder = given.out / name.replace(" ", "_")
        rows[name] = folder / "row.json"
        if rows[name].exists():
            continue
        plan = folder / "plan.json"
        if not plan.exists():
            alike = way.batch_size, way.settings.make_optimizer, way.settings.fine_layout  # take the same time a step
            if alike not in seconds:
                seconds[alike] = step_seconds(way.settings, way.batch_size, device)
            write_json(plan, {"steps": round(given.minutes * 60 / seconds[alike])})
        steps = json.loads(plan.read_text())["steps"]
        for file in given.out.glob("*/scenes-*.safetensors"):  # scenes are encoded once for all
            if not (folder / file.name).exists():
                (folder / file.name).hardlink_to(file)
        unet, text_encoder = train(*way, steps, folder, given.scenes, device, given.start)
        seen = looked_at(unet, text_encoder, device, given.pictures)
        write_json(rows[name], {"steps": steps, "samples": steps * way.batch_size, **seen})
    table = []
    for name, file in rows.items():
        row = json.loads(file.read_text())
        rates = [number(100 * row[key], 1) for key in ("presence", "all three", "three classes")]
        table.append([name, str(row["steps"]), str(row["samples"]), *rates])
    print(markdown_table(["way", "steps", "samples", "presence, %", "all three, %", "three classes, %"], table))


if __name__ == "__main__":
    main()
