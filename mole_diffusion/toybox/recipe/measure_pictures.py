"""How often the toybox's base and its LoRAs draw what they were asked for, as its oracle sees it."""

from __future__ import annotations

import numpy as np
from diffusers import StableDiffusionPipeline

from ..oracle import Oracle
from ..shapes import CLASSES
from ..subjects import SUBJECTS, Subject, described_prompt, subject, subject_prompt
from ..world import GROUNDS, article, phrase_caption, picture_side
from .draw import draw
from .loop import step_rng


def class_prompts(num_classes: int, num_prompts: int, seed: int) -> list[tuple[list[str], str]]:
    """Classes and prompt of seeded requests that name no look."""
    rng = step_rng(seed, "measure", num_classes)
    requests = []
    for _ in range(num_prompts):
        names = [str(name) for name in rng.choice(CLASSES, size=num_classes, replace=False)]
        phrases = [f"{article(name)} {name}" for name in names]
        requests.append((names, phrase_caption(phrases, str(rng.choice(GROUNDS)))))
    return requests


def measure_base(
    pipe: StableDiffusionPipeline, num_classes: int, *, num_pictures: int, seed: int = 0
) -> tuple[float, float]:
    """Of prompts with so many classes: the share of pictures that show all of them, and the share of classes shown."""
    requests = class_prompts(num_classes, num_pictures, seed)
    pictures = draw(pipe, [prompt for _, prompt in requests], seed=seed, side=picture_side(num_classes))
    complete, shown = [], []
    for (names, _), detections in zip(requests, Oracle().detect(pictures), strict=True):
        found = {d.class_name for d in detections}
        complete.append(set(names) <= found)
        shown.append(len(set(names) & found) / num_classes)
    return float(np.mean(complete)), float(np.mean(shown))


def measure_named(pipe: StableDiffusionPipeline, *, num_pictures: int, seed: int = 0) -> tuple[float, float]:
    """What the bare base makes of three looks named in words: the most that three LoRAs could show in its place.

    Returns:
        The share of subjects that are there in their look, and the share of pictures that show all three so.
    """
    rng = step_rng(seed, "measure-named", 0)
    asked = [[str(name) for name in rng.choice(list(SUBJECTS), size=3, replace=False)] for _ in range(num_pictures)]
    pictures = draw(pipe, [described_prompt(names, str(rng.choice(GROUNDS))) for names in asked], seed=seed)
    oracle = Oracle()
    found = [
        [finding.present for finding in oracle(picture, names).values()]
        for picture, names in zip(pictures, asked, strict=True)
    ]
    return float(np.mean(found)), float(np.mean([all(three) for three in found]))


def measure_subject(
    pipe: StableDiffusionPipeline, name: str | Subject, *, num_pictures: int, seed: int = 0, num_objects: int = 1
) -> float:
    """Share of pictures that show the subject in its look, when its LoRA is loaded and its token is in the prompt.

    Args:
        num_objects: Things in the prompt. The others are subjects with names, whose LoRAs are not loaded: what one LoRA
            of a mixture does where no other disturbs it.
    """
    item = subject(name)
    rng = step_rng(seed, "measure-subject", item.seed + 10_000 * (num_objects - 1))
    strangers = [other for other in SUBJECTS.values() if other.class_name != item.class_name]
    prompts = []
    for _ in range(num_pictures):
        ground = str(rng.choice(GROUNDS))
        others = [strangers[k] for k in rng.choice(len(strangers), size=num_objects - 1, replace=False)]
        others.insert(int(rng.integers(num_objects)), item)
        prompts.append(subject_prompt(others, ground))
    pictures = draw(pipe, prompts, seed=seed, side=picture_side(num_objects))
    oracle = Oracle()
    return float(np.mean([oracle(picture, [item])[item.name].present for picture in pictures]))
