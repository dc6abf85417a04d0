"""How well the toybox's CLIP tells right scenes and crops from wrong ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from mole_diffusion.clip import DifferentiableCLIP

from ..render import render_array
from ..subjects import SUBJECTS, described_prompt, reference_scenes, subject
from ..world import GROUNDS, Scene, compose_scene, random_look
from .loop import step_rng


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
