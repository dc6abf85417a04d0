"""The toybox world: looks, objects, scenes and how they are captioned."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from mole_diffusion.errors import MoLEError

from .shapes import CLASSES, PATTERNS

IMAGE_SIZE = 64  # side of a picture in pixels, up to four objects
CROWDED_SIZE = 80  # and beyond: six things 24 pixels wide need the room
_UNCROWDED_OBJECTS = 4
MAX_OBJECTS = 6

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.14, 0.14),
    "orange": (1.0, 0.55, 0.05),
    "yellow": (1.0, 0.9, 0.2),
    "green": (0.1, 0.62, 0.22),
    "blue": (0.12, 0.3, 0.88),
    "purple": (0.52, 0.16, 0.66),
    "pink": (1.0, 0.55, 0.78),
    "white": (0.98, 0.98, 0.98),
}
OUTLINE_COLOR = (0.1, 0.08, 0.12)
GROUNDS = ("grass", "sand", "snow", "water", "brick", "slate")

# Objects stand on a grid of 8 pixels and their side is a multiple of it, so that one cell of the base's features shows
# one part of one object: a small base learns such a world several times faster than one of free places. All have one
# size, so a thing in company looks as it does alone; at 16 pixels patterns can no longer be told.
GRID = 8
OBJECT_SIZE = 24
# How often a scene has so many objects.
_SHARES = {1: 0.15, 2: 0.13, 3: 0.22, 4: 0.2, 5: 0.15, 6: 0.15}


@dataclass(frozen=True)
class Look:
    """Two colours and a pattern: what tells one mug from another."""

    primary: str
    secondary: str
    pattern: str

    def __post_init__(self) -> None:
        for color in (self.primary, self.secondary):
            if color not in COLORS:
                raise MoLEError(f"color {color!r} is not one of {list(COLORS)}.")
        if self.pattern not in PATTERNS:
            raise MoLEError(f"pattern {self.pattern!r} is not one of {list(PATTERNS)}.")

    def __str__(self) -> str:
        colors = f"{self.primary} and {self.secondary}"
        return colors if self.pattern == "plain" else f"{self.pattern} {colors}"


@dataclass(frozen=True)
class SceneObject:
    """One object: class, look, and the top left corner and side of its box in pixels."""

    class_name: str
    look: Look
    x: int
    y: int
    size: int

    def __post_init__(self) -> None:
        if self.class_name not in CLASSES:
            raise MoLEError(f"class {self.class_name!r} is not one of {list(CLASSES)}.")

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom."""
        return (self.x, self.y, self.x + self.size, self.y + self.size)


@dataclass(frozen=True)
class Scene:
    """Objects on a ground; `seed` draws the ground's texture, `side` is the picture's in pixels."""

    ground: str
    objects: tuple[SceneObject, ...] = field(default=())
    seed: int = 0
    side: int = IMAGE_SIZE

    def __post_init__(self) -> None:
        if self.ground not in GROUNDS:
            raise MoLEError(f"ground {self.ground!r} is not one of {list(GROUNDS)}.")
        if self.side < 1 or self.side % GRID:
            raise MoLEError(f"side must be a multiple of {GRID} pixels, got {self.side}.")
        for item in self.objects:
            left, top, right, bottom = item.box
            if left < 0 or top < 0 or right > self.side or bottom > self.side:
                raise MoLEError(f"{item.class_name} with box {item.box} leaves the {self.side}×{self.side} picture.")


def picture_side(num_objects: int) -> int:
    """Side in pixels of a picture of so many objects: what a scene has, and what to ask the pipeline for."""
    return IMAGE_SIZE if num_objects <= _UNCROWDED_OBJECTS else CROWDED_SIZE


def random_look(rng: np.random.Generator) -> Look:
    """Half of all looks are plain, so that silhouettes show undisturbed."""
    primary, secondary = rng.choice(list(COLORS), size=2, replace=False)
    pattern = "plain" if rng.random() < 0.5 else str(rng.choice(PATTERNS[1:]))
    return Look(str(primary), str(secondary), pattern)


def place(count: int, side: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Top left corners on the grid for the boxes of so many objects, without overlap, drawn uniformly by rejection."""
    while True:
        corners: list[tuple[int, int]] = []
        for _ in range(count):
            for _ in range(40):
                x, y = (GRID * int(v) for v in rng.integers(0, (side - OBJECT_SIZE) // GRID + 1, size=2))
                if all(max(abs(x - cx), abs(y - cy)) >= OBJECT_SIZE for cx, cy in corners):
                    corners.append((x, y))
                    break
            else:
                break
        if len(corners) == count:
            return corners


def random_scene(rng: np.random.Generator, num_objects: int | None = None) -> Scene:
    """A scene of 1 to 6 objects of different classes; few objects are more frequent than many."""
    if num_objects is None:
        num_objects = int(rng.choice(list(_SHARES), p=list(_SHARES.values())))
    if not 1 <= num_objects <= MAX_OBJECTS:
        raise MoLEError(f"num_objects must be 1 to {MAX_OBJECTS}, got {num_objects}.")
    names = [str(name) for name in rng.choice(CLASSES, size=num_objects, replace=False)]
    looks = [random_look(rng) for _ in names]
    return compose_scene(names, looks, str(rng.choice(GROUNDS)), rng)


def random_scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """Random scenes of one side, which can be stacked; the first draws which."""
    scenes = [random_scene(rng)]
    while len(scenes) < count:
        scene = random_scene(rng)
        if scene.side == scenes[0].side:
            scenes.append(scene)
    return scenes


def compose_scene(names: list[str], looks: list[Look], ground: str, rng: np.random.Generator) -> Scene:
    """Puts the named objects somewhere on the ground, without overlap."""
    side = picture_side(len(names))
    corners = place(len(names), side, rng)
    objects = tuple(
        SceneObject(name, look, x, y, OBJECT_SIZE) for name, look, (x, y) in zip(names, looks, corners, strict=True)
    )
    return Scene(ground, objects, int(rng.integers(2**31)), side)


def caption(
    scene: Scene,
    rng: np.random.Generator,
    look_probability: float = 0.6,
    odd_words: tuple[str, ...] = (),
    full_probability: float = 0.0,
) -> str:
    """Says what is in the scene, from left to right: classes and ground always, each look with the given probability.

    A look that is named may be named in part ("a red mug"), so the base learns to draw what it was not told. In place
    of one object's look in five there stands one of `odd_words`, which mean nothing: a base that has met them takes
    a rare token without a LoRA for what it is. With `full_probability` the caption names all looks whole instead:
    left to chance, three whole looks would stand in one caption of twenty.
    """
    if full_probability and rng.random() < full_probability:
        return full_caption(replace(scene, objects=tuple(sorted(scene.objects, key=lambda item: (item.x, item.y)))))
    phrases = []
    for item in sorted(scene.objects, key=lambda item: (item.x, item.y)):
        words = ""
        if rng.random() < look_probability:
            words = f"{item.look} " if rng.random() < 0.6 else f"{item.look.primary} "
        elif odd_words and rng.random() < 0.5:
            words = f"{rng.choice(odd_words)} "
        phrases.append(f"{article(words or item.class_name)} {words}{item.class_name}")
    return phrase_caption(phrases, scene.ground)


def full_caption(scene: Scene) -> str:
    """A caption that names every object with its whole look, in the order of the scene."""
    phrases = [f"{article(str(item.look))} {item.look} {item.class_name}" for item in scene.objects]
    return phrase_caption(phrases, scene.ground)


def phrase_caption(phrases: list[str], ground: str) -> str:
    """A caption of phrases and a ground, such as "a photo of a mug, a cat and a boat on sand"."""
    things = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + f" and {phrases[-1]}"
    return f"a photo of {things} on {ground}"


def article(following: str) -> str:
    """The indefinite article before a word."""
    return "an" if following[0] in "aeiou" else "a"
