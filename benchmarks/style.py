"""A style beside two subjects: `python benchmarks/style.py`.

The style is a flood: whatever ground the prompt names, things lie on water. Its LoRA is trained first, from rendered
pictures on water whose captions name the other grounds, and takes part with the role "style" and without it.
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
from mole_diffusion.toybox.render import render
from mole_diffusion.toybox.shapes import CLASSES
from mole_diffusion.toybox.world import GROUNDS, Scene, compose_scene, phrase_caption, random_look
from mole_diffusion.training import LoRATrainingConfig, train_lora

STYLE, ASKED = "water", "slate"
OTHERS = [ground for ground in GROUNDS if ground != STYLE]
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

    style = given.out / "flood.safetensors"
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
                {item.name: toybox.lora_path(item.name) for item in items} | {"flood": style},
                triggers={item.name: item.trigger for item in items} | {"flood": f"on {ASKED}"},
                roles={"flood": role},
            )
            pipe.set_composition(method)
            rows[label] += looked_at(
                pipe,
                oracle,
                place(given.out, pair, label),
                toybox.subject_prompt(items, ASKED),
                given.seeds,
                lambda image, seen, own=items: look(image, seen, own),
            )
    table(rows, "both wishes", "normalized")


def look(image: Image.Image, seen: Sequence[Detection], items: Sequence[Any]) -> Row:
    """How many subjects are there, how much of the ground is water rather than what was asked for, and both."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    ground = np.ones(pixels.shape[:2], dtype=bool)
    for thing in seen:
        left, top, right, bottom = thing.box
        ground[top:bottom, left:right] = False
    distance = {name: np.abs(pixels - colors(name)).mean(axis=-1) for name in (STYLE, ASKED)}
    flooded = float((distance[STYLE] < distance[ASKED])[ground].mean()) if ground.any() else 0.0
    presence = concept_presence(seen, items)
    rate = presence["presence rate"]
    confusion = presence["confusion rate"]
    return {"presence rate": rate, "flooded": flooded, "both wishes": rate * flooded, "confusion rate": confusion}


def colors(ground: str) -> np.ndarray:
    """The mean colour of a ground."""
    return np.asarray(render(Scene(ground, seed=1)), dtype=np.float32).mean(axis=(0, 1)) / 255


def train(file: Path, steps: int) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(toybox.base_dir(), use_safetensors=True)
    rng = np.random.default_rng(5)
    scenes = [_scene(1 + k % 3, rng) for k in range(24)]
    captions = [
        phrase_caption([f"a {thing.look} {thing.class_name}" for thing in scene.objects], str(rng.choice(OTHERS)))
        for scene in scenes
    ]
    config = LoRATrainingConfig(captions=captions, steps=steps, resolution="native")
    train_lora(pipe, [render(scene) for scene in scenes], config, out=file, work=file.with_suffix(".work"))


def _scene(count: int, rng: np.random.Generator) -> Scene:
    names = [str(name) for name in rng.permutation(CLASSES)[:count]]
    return compose_scene(names, [random_look(rng) for _ in names], STYLE, rng)


if __name__ == "__main__":
    main()
