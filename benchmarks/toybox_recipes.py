"""Other ways to train the toybox's base, compared at equal time by its oracle: `python benchmarks/toybox_recipes.py`.

Each way trains a new denoiser for so many minutes, beside the shipped text encoder, which can read; its number of steps
is what fits into the time, and the learning rate falls to zero within them. Then the oracle counts how many of three
classes are there, and how many of three looks that a prompt names in words: what a composition of three LoRAs is judged
by. Stopped and started again, it goes on, except with SOAP. A GPU makes it worth reading. Needs
`pip install pytorch-optimizer`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from pytorch_optimizer import SOAP, Muon
from torch import nn
from transformers import CLIPTextModel

from mole_diffusion import toybox
from mole_diffusion.drawing.opening import pick_device
from mole_diffusion.files import write_json
from mole_diffusion.tables import markdown_table, number
from mole_diffusion.toybox.recipe.base import BaseSettings, load_base, train_base
from mole_diffusion.toybox.recipe.measure_pictures import measure_base, measure_named
from mole_diffusion.toybox.recipe.tokenizer import make_tokenizer
from mole_diffusion.toybox.recipe.vae import load_vae

AS_IT_IS = BaseSettings()
BATCH_SIZE, NUM_SCENES = 64, 20480


def muon(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Orthogonal steps for matrices and kernels, as long as AdamW's; AdamW for the rest."""
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


# What is tried: settings, and samples in a batch.
WAYS: dict[str, tuple[BaseSettings, int]] = {
    "as it is": (AS_IT_IS, BATCH_SIZE),
    "learning rate halved": (replace(AS_IT_IS, learning_rate=7e-4), BATCH_SIZE),
    "learning rate doubled": (replace(AS_IT_IS, learning_rate=2.8e-3), BATCH_SIZE),
    "batches of 32": (AS_IT_IS, 32),
    "batches of 128": (AS_IT_IS, 128),
    "timesteps even": (replace(AS_IT_IS, timestep_power=1.0), BATCH_SIZE),
    "timesteps towards the picture": (replace(AS_IT_IS, timestep_power=1.4), BATCH_SIZE),
    "average over a longer time": (replace(AS_IT_IS, average=0.9997), BATCH_SIZE),
    "average over a shorter time": (replace(AS_IT_IS, average=0.99), BATCH_SIZE),
    "no layout heads": (replace(AS_IT_IS, layout_weight=0.0), BATCH_SIZE),
    "Muon": (replace(AS_IT_IS, make_optimizer=muon), BATCH_SIZE),
    "SOAP": (replace(AS_IT_IS, make_optimizer=soap), BATCH_SIZE),
}


def train(
    settings: BaseSettings, batch_size: int, steps: int, folder: Path, num_scenes: int, device: torch.device
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """A new denoiser and the shipped text encoder, trained."""
    tokenizer, vae = make_tokenizer(), load_vae(toybox.base_dir() / "vae").to(device)
    _, text_encoder = load_base(toybox.base_dir(), tokenizer)
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
        settings=settings,
    )
    return unet, text_encoder


def step_seconds(settings: BaseSettings, batch_size: int, device: torch.device) -> float:
    """Time of a step: of the longer of two trainings beyond that of the shorter, after one to warm up."""
    taken = []
    for steps in (2, 2, 22):
        with TemporaryDirectory() as folder:
            begun = time.perf_counter()
            train(settings, batch_size, steps, Path(folder), num_scenes=320, device=device)
            taken.append(time.perf_counter() - begun)
    return (taken[2] - taken[1]) / 20


def looked_at(pipe: StableDiffusionPipeline, pictures: int) -> dict[str, Any]:
    presence, all_three = measure_named(pipe, num_pictures=pictures, seed=1)
    classes = measure_base(pipe, num_pictures=pictures, seed=1, rows=(3,))[3]
    return {"presence": presence, "all three": all_three, "three classes": classes[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training for each way")
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("outputs/toybox_recipes"))
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()

    given.out.mkdir(parents=True, exist_ok=True)
    device = pick_device(given.device)
    rows = {}
    for way in given.ways:
        settings, batch_size = WAYS[way]
        folder = given.out / way.replace(" ", "_")
        rows[way] = folder / "row.json"
        if rows[way].exists():
            continue
        plan = folder / "plan.json"
        if not plan.exists():
            step = step_seconds(settings, batch_size, device)
            write_json(plan, {"steps": round(given.minutes * 60 / step)})
        steps = json.loads(plan.read_text())["steps"]
        for file in given.out.glob("*/scenes-*.safetensors"):  # scenes are encoded once for all
            if not (folder / file.name).exists():
                (folder / file.name).hardlink_to(file)
        unet, text_encoder = train(settings, batch_size, steps, folder, NUM_SCENES, device)
        pipe = StableDiffusionPipeline.from_pretrained(toybox.base_dir(), unet=unet, text_encoder=text_encoder)
        pipe.to(device)
        write_json(rows[way], {"steps": steps, **looked_at(pipe, given.pictures)})
    table = []
    for way, file in rows.items():
        row = json.loads(file.read_text())
        rates = [number(100 * row[key], 1) for key in ("presence", "all three", "three classes")]
        table.append([way, str(row["steps"]), *rates])
    print(markdown_table(["way", "steps", "presence, %", "all three, %", "three classes, %"], table))


if __name__ == "__main__":
    main()
