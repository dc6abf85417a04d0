"""A style beside two subjects: `python benchmarks/style.py`.

The style is night: the toybox's things on a dark ground that its base never saw. Its LoRA is trained first, from
rendered pictures with every caption the world has, and takes part with the role "style" and without it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableDiffusionPipeline
from drawn import Row, looked_at, named, place, table, toybox_pipeline
from PIL import Image

from mole_diffusion import toybox
from mole_diffusion.metrics import concept_presence
from mole_diffusion.toybox.oracle import Detection
from mole_diffusion.toybox.render import paint
from mole_diffusion.toybox.shapes import CLASSES
from mole_diffusion.toybox.world import GROUNDS, Scene, compose_scene, phrase_caption, random_look
from mole_diffusion.training import LoRATrainingConfig, train_lora

NIGHT, STAR = (0.07, 0.08, 0.2), (0.95, 0.95, 0.7)
PAIRS = ("cat+boot", "mug+fish", "robot+house", "teapot+car")
# Composition and role of the style.
METHODS = {
    "masks, as a style": ("masks", "style"),
    "masks, as a subject": ("masks", "subject"),
    "norm_router, as a style": ("norm_router", "style"),
    "budget": ("budget", "style"),
    "normalized": ("normalized", "style"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/style"))
    parser.add_argument("--steps", type=int, default=400, help="of the style's training")
    parser.add_argument("--seeds", type=int, default=10, help="pictures for each pair")
    given = parser.parse_args()

    style = given.out / "night.safetensors"
    if not style.exists():
        train(style, given.steps)
    pipe, oracle = toybox_pipeline(), toybox.Oracle()
    rows: dict[str, list[Row]] = {label: [] for label in METHODS}
    for pair in PAIRS:
        items = named(pair.split("+"))
        for label, (method, role) in METHODS.items():
            pipe.unload_loras()
            # As a subject it needs words of its own in the prompt, and has those for the ground.
            pipe.load_loras(
                {item.name: toybox.lora_path(item.name) for item in items} | {"night": style},
                triggers={item.name: item.trigger for item in items} | {"night": "on slate"},
                roles={"night": role},
            )
            pipe.set_composition(method)
            rows[label] += looked_at(
                pipe,
                oracle,
                place(given.out, pair, label),
                toybox.subject_prompt(items, "slate"),
                given.seeds,
                lambda image, seen, own=items: look(image, seen, own),
            )
    table(rows, "both wishes", "normalized")


def look(image: Image.Image, seen: Sequence[Detection], items: Sequence[Any]) -> Row:
    """How many subjects are there, how much of the ground is dark, and both together."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    ground = np.ones(pixels.shape[:2], dtype=bool)
    for thing in seen:
        left, top, right, bottom = thing.box
        ground[top:bottom, left:right] = False
    night = float((pixels[ground].mean(axis=1) < 0.3).mean()) if ground.any() else 0.0
    presence = concept_presence(seen, items)
    rate = presence["presence rate"]
    confusion = presence["confusion rate"]
    return {"presence rate": rate, "night": night, "both wishes": rate * night, "confusion rate": confusion}


def train(file: Path, steps: int) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(toybox.base_dir(), use_safetensors=True)
    rng = np.random.default_rng(5)
    scenes = [_scene(1 + k % 3, rng) for k in range(24)]
    captions = [
        phrase_caption([f"a {thing.look} {thing.class_name}" for thing in scene.objects], scene.ground)
        for scene in scenes
    ]
    config = LoRATrainingConfig(captions=captions, steps=steps, resolution="native")
    train_lora(pipe, [_at_night(scene) for scene in scenes], config, out=file, work=file.with_suffix(".work"))


def _scene(count: int, rng: np.random.Generator) -> Scene:
    names = [str(name) for name in rng.permutation(CLASSES)[:count]]
    return compose_scene(names, [random_look(rng) for _ in names], str(rng.choice(GROUNDS)), rng)


def _at_night(scene: Scene) -> Image.Image:
    rng = np.random.default_rng(scene.seed)
    picture = np.broadcast_to(np.array(NIGHT, np.float32), (scene.side, scene.side, 3)).copy()
    for y, x in rng.integers(0, scene.side // 2, size=(12, 2)):
        picture[2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = STAR
    for thing in scene.objects:
        paint(picture, thing)
    return Image.fromarray((picture * 255).round().astype(np.uint8))


if __name__ == "__main__":
    main()
