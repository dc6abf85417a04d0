"""How good the toybox is, by its own oracle: the base, the subject LoRAs, its CLIP, and the oracle itself.

Floors that the rows should reach stand in `docs/toybox.md`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.pipelines import MoLEStableDiffusionPipeline
from mole_diffusion.progress import tracked

from ..subjects import SUBJECTS
from .measure_clip import measure_clip, measure_crops
from .measure_oracle import measure_oracle
from .measure_pictures import measure_base, measure_named, measure_subject


def measure(assets: Path, *, seed: int, device: torch.device, num_pictures: int) -> dict:
    """Everything that is said of the shipped toybox; the numbers of its `report.json`.

    Rows of the base have `num_pictures` pictures each, the oracle and CLIP as many scenes. Every subject has a quarter
    of that alone, where the worst of them counts; in prompts of three and of five things they share `num_pictures`.
    """
    pipe = MoLEStableDiffusionPipeline.from_pretrained(assets / "base").to(device)
    table = measure_base(pipe, num_pictures=num_pictures, seed=seed)
    presence, all_three = measure_named(pipe, num_pictures=num_pictures, seed=seed)
    rows: dict[int, dict[str, float]] = {1: {}, 3: {}, 5: {}}
    for name in tracked(list(SUBJECTS), "subjects"):
        pipe.load_loras({name: assets / "loras" / f"{name}.safetensors"})
        for num_objects, rates in rows.items():
            share = max(1, num_pictures // (4 if num_objects == 1 else len(SUBJECTS)))
            rates[name] = measure_subject(pipe, name, num_pictures=share, seed=seed, num_objects=num_objects)
        pipe.unload_loras()
    clip = DifferentiableCLIP(assets / "clip")
    return {
        "pictures": num_pictures,
        "base": {str(n): {"all": complete, "each": shown} for n, (complete, shown) in table.items()},
        "three_looks_named": {"presence": presence, "all": all_three},
        "subjects": rows[1],
        "subjects_mean": float(np.mean(list(rows[1].values()))),
        "subjects_worst": min(rows[1].values()),
        "subjects_in_company": {
            str(n): {"mean": float(np.mean(list(rates.values()))), "worst": min(rates.values())}
            for n, rates in rows.items()
            if n > 1
        },
        "clip": measure_clip(clip, num_scenes=num_pictures, seed=seed),
        "clip_crops_d_prime": measure_crops(clip, num_scenes=num_pictures, seed=seed),
        "oracle": {
            "rendered": measure_oracle(None, num_scenes=num_pictures, seed=seed),
            "autoencoder": measure_oracle(pipe.vae, num_scenes=num_pictures, seed=seed),
        },
    }
