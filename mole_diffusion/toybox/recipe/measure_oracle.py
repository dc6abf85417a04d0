"""How well the toybox's oracle reads scenes of which the truth is known."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ..oracle import Detection, Oracle
from ..render import render
from ..world import random_scene
from .loop import step_rng


@torch.no_grad()
def measure_oracle(vae: AutoencoderKL | None, *, num_scenes: int, seed: int = 0) -> dict:
    """The oracle against rendered truth, straight or through the autoencoder.

    Returns:
        `hits`: share of drawn objects found with the right class at the right place; `looks`: share of those
        whose look is right too; `false_alarms`: objects found where none stands, per picture; `confusion`: pairs
        (drawn class, found class) and how often; `errors`: median, 95 %, 99 % and largest error of what was found.
    """
    oracle = Oracle()
    rng = step_rng(seed, "measure-oracle", 0)
    scenes = [random_scene(rng) for _ in range(num_scenes)]
    pictures = [render(scene) for scene in scenes]
    if vae is not None:
        pictures = [_round_trip(vae, picture) for picture in pictures]
    drawn = hits = looks = false_alarms = 0
    confusion: Counter[tuple[str, str]] = Counter()
    errors = []
    for scene, detections in zip(scenes, oracle.detect(pictures), strict=True):
        free = list(detections)
        for item in scene.objects:
            drawn += 1
            match = next((d for d in free if _close(d, item.box)), None)
            if match is None:
                confusion[item.class_name, "nothing"] += 1
                continue
            free.remove(match)
            errors.append(match.error)
            confusion[item.class_name, match.class_name] += 1
            hits += match.class_name == item.class_name
            looks += match.class_name == item.class_name and match.look == item.look
        false_alarms += len(free)
    return {
        "hits": hits / drawn,
        "looks": looks / max(1, hits),
        "false_alarms": false_alarms / num_scenes,
        "confusion": {f"{a} as {b}": n for (a, b), n in confusion.most_common() if a != b},
        "errors": [round(float(q), 3) for q in np.quantile(errors, [0.5, 0.95, 0.99, 1])] if errors else [],
    }


def _close(detection: Detection, box: tuple[int, int, int, int]) -> bool:
    """The centres lie within a third of the object's size."""
    x = (detection.box[0] + detection.box[2] - box[0] - box[2]) / 2
    y = (detection.box[1] + detection.box[3] - box[1] - box[3]) / 2
    return max(abs(x), abs(y)) <= (box[2] - box[0]) / 3


def _round_trip(vae: AutoencoderKL, picture: Image.Image) -> Image.Image:
    pixels = torch.from_numpy(np.asarray(picture, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample[0]
    array = ((decoded + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy()
    return Image.fromarray(array)
