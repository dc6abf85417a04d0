"""The oracle against scenes whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mole_diffusion.toybox import Oracle, render
from mole_diffusion.toybox.shapes import CLASSES, ink_masks
from mole_diffusion.toybox.subjects import SUBJECTS
from mole_diffusion.toybox.world import COLORS, OUTLINE_COLOR, Look, Scene, SceneObject, compose_scene, random_scene


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def test_rendered_objects_are_all_found_with_class_look_and_place(oracle: Oracle) -> None:
    rng = np.random.default_rng(0)
    for number in (1, 2, 3, 4, 5, 6):  # 64 pixels wide, and 80 from five on
        scene = random_scene(rng, number)
        found = oracle.detect([render(scene)])[0]
        drawn = {(item.class_name, item.look, item.box) for item in scene.objects}
        assert {(d.class_name, d.look, d.box) for d in found} == drawn
        assert max(d.error for d in found) < 0.01


def test_the_error_is_the_masked_difference_written_out(oracle: Oracle) -> None:
    """The convolutions against a plain comparison of pixels, on a noisy picture."""
    item = SceneObject("mug", Look("red", "blue", "striped"), 20, 12, 24)
    rng = np.random.default_rng(1)
    picture = np.asarray(render(Scene("sand", (item,))), np.float64) / 255
    picture = (picture + rng.normal(0, 0.05, picture.shape)).clip(0, 1)
    from PIL import Image

    noisy = Image.fromarray((picture * 255).round().astype(np.uint8))
    masks = ink_masks("mug", "striped", 24).astype(np.float64)
    colors = np.array([OUTLINE_COLOR, COLORS["red"], COLORS["blue"]])
    total = {"outline": [0.0, 0.0], "fill": [0.0, 0.0]}
    for y in range(24):
        for x in range(24):
            inks = masks[:, y, x]
            if inks.sum() <= 0.99:
                continue
            drawn = sum(inks[k] * colors[k] for k in range(3))
            seen = np.asarray(noisy, np.float64)[12 + y, 20 + x] / 255
            square = ((seen - drawn) ** 2).mean()
            for kind, weight in (("outline", inks[0]), ("fill", 1 - inks[0])):
                total[kind][0] += weight * square
                total[kind][1] += weight
    expected = np.sqrt(np.mean([squares / weight for squares, weight in total.values()]))
    found = next(d for d in oracle.detect([noisy])[0] if d.class_name == "mug")
    assert found.error == pytest.approx(expected, rel=1e-3)


def _scene(names: list[str], looks: list[Look]) -> Scene:
    return compose_scene([SUBJECTS[name].class_name for name in names], looks, "sand", np.random.default_rng(4))


def test_a_missing_subject_is_missed(oracle: Oracle) -> None:
    picture = render(_scene(["cat", "boot"], [SUBJECTS["cat"].look, SUBJECTS["boot"].look]))
    found = oracle(picture, ["cat", "boot", "teapot"])
    assert [found[name].present for name in ("cat", "boot", "teapot")] == [True, True, False]
    assert found["teapot"].box is None
    assert not found["teapot"].class_present


def test_swapped_looks_are_told(oracle: Oracle) -> None:
    scene = _scene(["cat", "boot"], [SUBJECTS["boot"].look, SUBJECTS["cat"].look])
    found = oracle(render(scene), ["cat", "boot"])
    assert not found["cat"].present
    assert found["cat"].class_present
    assert found["cat"].wears == "boot"
    assert found["cat"].leaked_to == ("boot",)


def test_a_strangers_look_is_nobodys(oracle: Oracle) -> None:
    scene = _scene(["cat"], [Look("green", "pink", "dotted")])
    found = oracle(render(scene), ["cat"])["cat"]
    assert (found.present, found.class_present, found.wears) == (False, True, None)


def test_grounds_alone_raise_no_alarm(oracle: Oracle) -> None:
    for ground in ("grass", "sand", "snow", "water", "brick", "slate"):
        assert oracle.detect([render(Scene(ground))]) == [[]]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_found_in_an_unseen_size(oracle: Oracle, name: str) -> None:
    item = SceneObject(name, Look("orange", "green", "plain"), 10, 14, 32)
    found = oracle.detect([render(Scene("slate", (replace(item, size=28),)))])[0]
    assert [d.class_name for d in found] == [name]


def test_a_look_has_two_colours_even_where_one_was_painted_over(oracle: Oracle) -> None:
    item = SceneObject("tree", Look("red", "red", "plain"), 16, 16, 32)
    [found] = oracle.detect([render(Scene("snow", (item,)))])[0]
    assert found.look.primary == "red" != found.look.secondary
