"""From a scene to its picture."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .shapes import ink_masks
from .world import COLORS, GRID, OUTLINE_COLOR, Scene, SceneObject

_GROUND_COLORS = {
    "grass": ((0.55, 0.72, 0.40), (0.44, 0.62, 0.32)),
    "sand": ((0.88, 0.80, 0.60), (0.80, 0.70, 0.50)),
    "snow": ((0.86, 0.92, 0.96), (0.76, 0.84, 0.92)),
    "water": ((0.45, 0.72, 0.80), (0.34, 0.62, 0.74)),
    "brick": ((0.70, 0.46, 0.38), (0.82, 0.68, 0.60)),
    "slate": ((0.58, 0.60, 0.64), (0.48, 0.50, 0.55)),
}


def _ground_pattern(ground: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """How much of the second ground colour each pixel takes, shape `(side, side)`, 0 to 1."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    dx, dy = (GRID * float(v) for v in rng.integers(0, 16, size=2))
    x, y = x + dx, y + dy
    if ground == "grass":  # upright blades, shifted from column to column
        return np.maximum(0, np.sin(x * 1.6) * np.sin(y * 0.55 + 2.1 * np.floor(x / 4)))
    if ground == "sand":  # dunes
        return 0.5 + 0.5 * np.sin(0.35 * y + 1.2 * np.sin(0.12 * x) + 0.15 * x)
    if ground == "snow":  # soft drifts
        return 0.5 + 0.5 * np.sin(0.12 * x + 0.5 * np.sin(0.1 * y)) * np.sin(0.13 * y + 1)
    if ground == "water":  # waves
        return (np.sin(0.8 * y + 1.6 * np.sin(0.3 * x)) > 0.3).astype(np.float32)
    if ground == "brick":  # mortar between courses
        row = np.floor(y / 8)
        return ((y % 8 < 1.5) | ((x + 8 * (row % 2)) % 16 < 1.5)).astype(np.float32)
    return (((x // 10) + (y // 10)) % 2).astype(np.float32)  # slate: flagstones


def render_array(scene: Scene) -> np.ndarray:
    """The picture as float32 of shape `(side, side, 3)`, values 0 to 1; later objects cover earlier ones."""
    rng = np.random.default_rng(scene.seed)
    amount = _ground_pattern(scene.ground, scene.side, rng)[..., None]
    light, dark = (np.array(color, np.float32) for color in _GROUND_COLORS[scene.ground])
    picture = (light * (1 - amount) + dark * amount).astype(np.float32)
    for item in scene.objects:
        paint(picture, item)
    return picture


def paint(picture: np.ndarray, item: SceneObject) -> None:
    """Draws one object into a picture of shape `(height, width, 3)`, in place."""
    masks = ink_masks(item.class_name, item.look.pattern, item.size)
    inks = np.array([OUTLINE_COLOR, COLORS[item.look.primary], COLORS[item.look.secondary]], np.float32)
    left, top, right, bottom = item.box
    region = picture[top:bottom, left:right]
    region *= 1 - masks.sum(axis=0)[..., None]
    region += np.einsum("ihw,ic->hwc", masks, inks)


def render(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, as large as the scene is: 64×64, or 80×80 for five objects and more."""
    return Image.fromarray((render_array(scene) * 255).round().clip(0, 255).astype(np.uint8))
