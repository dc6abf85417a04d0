"""How good the toybox is, by its own oracle: the base, the subject LoRAs, its CLIP, and the oracle itself.

Floors that the rows should reach stand in `docs/toybox.md`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.pipelines import MoLEStableDiffusionPipeline
from mole_diffusion.progress import tracked

from ..oracle import Detection, Oracle
from ..render import render, render_array
from ..shapes import CLASSES
from ..subjects import SUBJECTS, Subject, described_prompt, reference_scenes, subject, subject_prompt
from ..world import (
    GROUNDS,
    IMAGE_SIZE,
    Scene,
    article,
    compose_scene,
    phrase_caption,
    picture_side,
    random_look,
    random_scene,
)
from .loop import step_rng
from .precision import fast_autocast

NUM_INFERENCE_STEPS = 25
GUIDANCE_SCALE = 3.0  # at 5 colours run over: of 200 pictures of one class, 148 showed it instead of 166
_CHUNK = 50


def draw(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    side: int = IMAGE_SIZE,
) -> list[Image.Image]:
    """One picture a prompt, `side` pixels wide; picture k has the noise of `seed + k` whatever the others are.

    The models run in bfloat16 where that is faster.
    """
    pictures: list[Image.Image] = []
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), _CHUNK):
        chunk = list(prompts[start : start + _CHUNK])
        generators = [torch.Generator("cpu").manual_seed(seed + start + k) for k in range(len(chunk))]
        with fast_autocast(pipe.device):
            pictures += pipe(
                chunk,
                num_inference_steps=NUM_INFERENCE_STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=generators,
                height=side,
                width=side,
            ).images
    return pictures


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
    pipe: StableDiffusionPipeline, *, num_pictures: int, seed: int = 0, rows: Sequence[int] = (1, 2, 3, 4, 5, 6)
) -> dict[int, tuple[float, float]]:
    """Per number of named classes: the share of pictures that show all of them, and the share of classes shown."""
    oracle = Oracle()
    table = {}
    for num_classes in tracked(rows, "base"):
        requests = class_prompts(num_classes, num_pictures, seed)
        pictures = draw(pipe, [prompt for _, prompt in requests], seed=seed, side=picture_side(num_classes))
        complete, shown = [], []
        for (names, _), detections in zip(requests, oracle.detect(pictures), strict=True):
            found = {d.class_name for d in detections}
            complete.append(set(names) <= found)
            shown.append(len(set(names) & found) / num_classes)
        table[num_classes] = (float(np.mean(complete)), float(np.mean(shown)))
    return table


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


@torch.no_grad()
def measure_clip(clip: DifferentiableCLIP, *, num_scenes: int, seed: int = 0) -> dict[str, float]:
    """How often CLIP finds that a prompt of three subjects suits its scene better than one with a thing wrong.

    Returns:
        Share of scenes, 0.5 for one who guesses, where the wrong scene lacks an object ("object missing"), has an
        object with a look of no subject ("wrong look"), or has the right looks on the wrong objects ("looks swapped").
    """
    rng = step_rng(seed, "measure-clip", 0)
    names, scenes = [], []
    for _ in range(num_scenes):
        three = [str(name) for name in rng.choice(list(SUBJECTS), size=3, replace=False)]
        items = [subject(name) for name in three]
        scene = compose_scene(
            [item.class_name for item in items], [item.look for item in items], str(rng.choice(GROUNDS)), rng
        )
        first, second, third = scene.objects
        swapped = (replace(first, look=second.look), replace(second, look=third.look), replace(third, look=first.look))
        wrong = {
            "object missing": (second, third),
            "wrong look": (replace(first, look=random_look(rng)), second, third),
            "looks swapped": swapped,
        }
        names.append(three)
        scenes.append([scene, *(replace(scene, objects=objects) for objects in wrong.values())])
    prompts = [described_prompt(three, group[0].ground) for three, group in zip(names, scenes, strict=True)]
    pixels = np.stack([render_array(scene) for group in scenes for scene in group])
    features = clip.encode_image(torch.from_numpy(pixels).permute(0, 3, 1, 2)).unflatten(0, (num_scenes, -1))
    scores = torch.einsum("skw,sw->ks", features.float(), clip.encode_text(prompts).float())
    return {kind: (scores[0] > other).float().mean().item() for kind, other in zip(wrong, scores[1:], strict=True)}


@torch.no_grad()
def measure_crops(clip: DifferentiableCLIP, *, num_scenes: int, seed: int = 0) -> float:
    """How surely the image encoder tells a subject's crop from one of the same class in another look: d′.

    A crop's score is its mean cosine to the subject's reference pictures, cut to the subject as the crop is. d′ is the
    distance between the mean scores of right and wrong crops in units of their (root mean square) standard deviation:
    0 for an encoder that is blind to looks, 2 where five crops of six land on the right side of the middle.
    """
    rng = step_rng(seed, "measure-crops", 0)
    scores: dict[bool, list[float]] = {True: [], False: []}
    references = {
        name: clip.encode_image(torch.stack([_crop(scene, 0) for scene in reference_scenes(name)])) for name in SUBJECTS
    }
    for _ in range(num_scenes):
        name, *others = (str(name) for name in rng.choice(list(SUBJECTS), size=3, replace=False))
        items = [subject(other) for other in (name, *others)]
        scene = compose_scene(
            [item.class_name for item in items], [item.look for item in items], str(rng.choice(GROUNDS)), rng
        )
        look = random_look(rng)
        while look == items[0].look:
            look = random_look(rng)
        wrong = replace(scene, objects=(replace(scene.objects[0], look=look), *scene.objects[1:]))
        crops = clip.encode_image(torch.stack([_crop(scene, 0), _crop(wrong, 0)]))
        right_score, wrong_score = (crops.float() @ references[name].float().T).mean(dim=1).tolist()
        scores[True].append(right_score)
        scores[False].append(wrong_score)
    spread = np.sqrt((np.var(scores[True]) + np.var(scores[False])) / 2)
    return float((np.mean(scores[True]) - np.mean(scores[False])) / max(spread, 1e-6))


def _crop(scene: Scene, index: int) -> torch.Tensor:
    """The object's box cut out of the picture, `(3, size, size)`."""
    left, top, right, bottom = scene.objects[index].box
    return torch.from_numpy(render_array(scene)[top:bottom, left:right]).permute(2, 0, 1)


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


def measure(assets: Path, *, seed: int, device: torch.device, num_pictures: int) -> dict:
    """Everything that is said of the shipped toybox; the numbers of its `report.json`.

    Rows of the base have `num_pictures` pictures each, the oracle and CLIP as many scenes, every subject a quarter of
    that, alone and in prompts of three and of five things.
    """
    pipe = MoLEStableDiffusionPipeline.from_pretrained(assets / "base").to(device)
    table = measure_base(pipe, num_pictures=num_pictures, seed=seed)
    presence, all_three = measure_named(pipe, num_pictures=num_pictures, seed=seed)
    rows: dict[int, dict[str, float]] = {1: {}, 3: {}, 5: {}}
    for name in tracked(list(SUBJECTS), "subjects"):
        pipe.load_loras({name: assets / "loras" / f"{name}.safetensors"})
        for num_objects, rates in rows.items():
            rates[name] = measure_subject(
                pipe, name, num_pictures=max(1, num_pictures // 4), seed=seed, num_objects=num_objects
            )
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
