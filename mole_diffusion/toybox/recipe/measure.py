"""How good the toybox is, by its own oracle: the base, the subject LoRAs, its CLIP, and the oracle itself.

Floors that the rows should reach stand in `docs/toybox.md`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.files import sha256
from mole_diffusion.pipelines import MoLEStableDiffusionPipeline
from mole_diffusion.progress import tracked

from ..subjects import SUBJECTS
from .kept_numbers import KeptNumbers
from .measure_clip import measure_clip, measure_crops
from .measure_oracle import measure_oracle
from .measure_pictures import measure_base, measure_named, measure_subject


def measure(assets: Path, *, seed: int, device: torch.device, num_pictures: int, part: Path) -> dict:
    """Everything that is said of the shipped toybox; the numbers of its `report.json`.

    Rows of the base have `num_pictures` pictures each, the oracle and CLIP as many scenes. Every subject has a quarter
    of that alone, where the worst of them counts; in prompts of three and of five things they share `num_pictures`.

    Args:
        assets: Folder of a built toybox.
        seed: Of the prompts and of the noise.
        device: Where pictures are drawn.
        num_pictures: See above.
        part: File for what was measured so far. It stays, so that a report that cannot be written costs nothing.
    """
    kept = KeptNumbers(part, _made_of(assets, seed, device, num_pictures))
    pipe = MoLEStableDiffusionPipeline.from_pretrained(assets / "base").to(device)
    table = {}
    for n in tracked((1, 2, 3, 4, 5, 6), "base"):
        table[n] = kept.get(f"base {n}", measure_base, pipe, n, num_pictures=num_pictures, seed=seed)
    presence, all_three = kept.get("named", measure_named, pipe, num_pictures=num_pictures, seed=seed)
    rows: dict[int, dict[str, float]] = {1: {}, 3: {}, 5: {}}
    for name in tracked(list(SUBJECTS), "subjects"):
        pipe.load_loras({name: assets / "loras" / f"{name}.safetensors"})
        for n, rates in rows.items():
            share = max(1, num_pictures // (4 if n == 1 else len(SUBJECTS)))
            given = {"num_pictures": share, "seed": seed, "num_objects": n}
            rates[name] = kept.get(f"{name} {n}", measure_subject, pipe, name, **given)
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
        "clip": kept.get("clip", measure_clip, clip, num_scenes=num_pictures, seed=seed),
        "clip_crops_d_prime": kept.get("crops", measure_crops, clip, num_scenes=num_pictures, seed=seed),
        "oracle": {
            "rendered": kept.get("rendered", measure_oracle, None, num_scenes=num_pictures, seed=seed),
            "autoencoder": kept.get("autoencoder", measure_oracle, pipe.vae, num_scenes=num_pictures, seed=seed),
        },
    }


def _made_of(assets: Path, seed: int, device: torch.device, num_pictures: int) -> dict[str, Any]:
    """What changes a number."""
    files = sorted(path for part in ("base", "loras", "clip") for path in (assets / part).rglob("*") if path.is_file())
    return {
        "pictures": num_pictures,
        "seed": seed,
        "device": device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "files": {path.relative_to(assets).as_posix(): sha256(path) for path in files},
    }
