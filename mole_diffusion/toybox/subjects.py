"""The subjects: one object each with one look of its own, a rare token and five reference pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mole_diffusion.errors import MoLEError

from .render import render
from .vocabulary import RARE_TOKENS
from .world import GROUNDS, Look, Scene, compose_scene, phrase_caption

NUM_REFERENCES = 5


@dataclass(frozen=True)
class Subject:
    """A particular object: "my cat", not any cat. `seed` draws the scenes that its LoRA learns from."""

    name: str
    class_name: str
    look: Look
    token: str
    seed: int

    @property
    def trigger(self) -> str:
        """The words that call it in a prompt: token and class, as in "<v1> cat"."""
        return f"{self.token} {self.class_name}"


_LOOKS = {
    "cat": Look("orange", "white", "striped"),
    "boot": Look("red", "yellow", "plain"),
    "teapot": Look("blue", "white", "dotted"),
    "mug": Look("green", "orange", "striped"),
    "robot": Look("purple", "yellow", "plain"),
    "clock": Look("pink", "blue", "dotted"),
    "house": Look("yellow", "red", "striped"),
    "fish": Look("white", "purple", "dotted"),
    "mushroom": Look("red", "white", "dotted"),
    "car": Look("blue", "orange", "plain"),
    "flower": Look("pink", "green", "striped"),
    "boat": Look("white", "red", "striped"),
}
SUBJECTS = {
    name: Subject(name, name, look, token, seed)
    for seed, ((name, look), token) in enumerate(zip(_LOOKS.items(), RARE_TOKENS, strict=False))
}


def subject(name: str | Subject) -> Subject:
    """Looks a subject up by name; a subject that is no name, such as an anonymous one, stands for itself.

    Raises:
        MoLEError: There is no such subject.
    """
    if isinstance(name, Subject):
        return name
    if name not in SUBJECTS:
        raise MoLEError(f"subject {name!r} is not one of {list(SUBJECTS)}.")
    return SUBJECTS[name]


def reference_scenes(name: str | Subject) -> list[Scene]:
    """Five scenes that show the subject alone, each on another ground."""
    item = subject(name)
    rng = np.random.default_rng([5, item.seed])
    grounds = rng.permutation(GROUNDS)[:NUM_REFERENCES]
    return [compose_scene([item.class_name], [item.look], str(ground), rng) for ground in grounds]


def references(name: str | Subject) -> list[Image.Image]:
    """The subject's five reference pictures, 64×64 RGB."""
    return [render(scene) for scene in reference_scenes(name)]


def reference_captions(name: str | Subject) -> list[str]:
    """What the reference pictures are captioned with: token and class, and the ground."""
    return [subject_prompt([name], scene.ground) for scene in reference_scenes(name)]


def subject_prompt(names: Sequence[str | Subject], ground: str) -> str:
    """The prompt that asks for these subjects: "a photo of a <v1> cat and a <v2> boot on grass"."""
    items = [subject(name) for name in names]
    return phrase_caption([f"a {item.trigger}" for item in items], ground)


def described_prompt(names: Sequence[str | Subject], ground: str) -> str:
    """The same prompt in words that CLIP knows: each look is named instead of its token."""
    items = [subject(name) for name in names]
    return phrase_caption([f"a {item.look} {item.class_name}" for item in items], ground)
