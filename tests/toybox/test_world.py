"""The toybox world: scenes, captions, subjects."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from PIL import Image

from mole_diffusion import toybox
from mole_diffusion.toybox.recipe.tokenizer import make_tokenizer
from mole_diffusion.toybox.render import render_array
from mole_diffusion.toybox.shapes import CLASSES, PATTERNS, ink_masks
from mole_diffusion.toybox.subjects import SUBJECTS, described_prompt, reference_captions, reference_scenes
from mole_diffusion.toybox.vocabulary import MAX_TOKENS, RARE_TOKENS
from mole_diffusion.toybox.world import (
    COLORS,
    GROUNDS,
    MAX_OBJECTS,
    Look,
    Scene,
    SceneObject,
    caption,
    compose_scene,
    full_caption,
    random_look,
    random_scene,
    random_scenes,
)


def test_the_world_has_sixteen_classes_six_grounds_and_six_objects_a_scene() -> None:
    rng = np.random.default_rng(0)
    counts = {len(random_scene(rng).objects) for _ in range(200)}
    assert (len(CLASSES), len(GROUNDS), counts) == (16, 6, {1, 2, 3, 4, 5, 6})


@pytest.mark.parametrize("number", range(1, MAX_OBJECTS + 1))
def test_objects_of_a_scene_stay_inside_and_apart(number: int) -> None:
    rng = np.random.default_rng(number)
    for _ in range(30):
        scene = random_scene(rng, number)
        assert scene.side == toybox.picture_side(number) == (64 if number < 5 else 80)
        covered = np.zeros((scene.side, scene.side), int)
        for item in scene.objects:
            assert item.size == 24
            left, top, right, bottom = item.box
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1


@pytest.mark.parametrize("size", [16, 32])
def test_every_class_is_drawn_differently(size: int) -> None:
    outlines = {name: ink_masks(name, "plain", size)[0] for name in CLASSES}
    for first in CLASSES:
        for second in CLASSES:
            if first < second:
                assert np.abs(outlines[first] - outlines[second]).mean() > 0.05, (first, second)


@pytest.mark.parametrize("name", CLASSES)
def test_both_colours_and_the_pattern_show(name: str) -> None:
    plain, *patterned = (ink_masks(name, pattern, 24) for pattern in PATTERNS)
    assert (plain.sum(axis=(1, 2)) > 10).all()
    for masks in patterned:
        np.testing.assert_array_equal(masks[0], plain[0])  # the outline tells the class, whatever the pattern
        assert np.abs(masks[2] - plain[2]).sum() > 10


def test_a_picture_shows_the_colours_of_its_objects() -> None:
    item = SceneObject("heart", Look("red", "white", "plain"), 16, 16, 32)
    picture = render_array(Scene("snow", (item,)))
    assert tuple(picture[30, 32]) == pytest.approx(COLORS["white"])
    assert toybox.render(Scene("snow", (item,))).size == (64, 64)
    assert toybox.render(Scene("snow", (item,), side=96)).size == (96, 96)


def test_scenes_of_one_side_can_be_stacked() -> None:
    sides = {tuple({scene.side for scene in random_scenes(np.random.default_rng(k), 8)}) for k in range(20)}
    assert sides == {(64,), (80,)}


def test_captions_name_classes_and_ground_always_and_looks_sometimes() -> None:
    rng = np.random.default_rng(1)
    named = 0
    for _ in range(100):
        scene = random_scene(rng, 3)
        words = caption(scene, rng)
        assert all(item.class_name in words for item in scene.objects)
        assert words.endswith(f"on {scene.ground}")
        named += any(color in words for color in COLORS)
        assert all(str(item.look) in full_caption(scene) for item in scene.objects)
    assert 50 < named < 100


def test_some_captions_name_every_look_whole() -> None:
    rng = np.random.default_rng(8)
    whole = 0
    for _ in range(100):
        scene = random_scene(rng, 3)
        words = caption(scene, rng, odd_words=RARE_TOKENS, full_probability=0.5)
        whole += all(f"{item.look} {item.class_name}" in words for item in scene.objects)
        said = [words.index(item.class_name) for item in sorted(scene.objects, key=lambda item: (item.x, item.y))]
        assert said == sorted(said)  # from left to right, in whole captions too
    assert 40 < whole < 70


def test_captions_go_from_left_to_right() -> None:
    look = Look("red", "white", "plain")
    items = [SceneObject(name, look, x, y, 16) for name, x, y in (("mug", 40, 0), ("cat", 0, 40), ("boot", 0, 16))]
    for objects in permutations(items):
        words = caption(Scene("sand", objects), np.random.default_rng(0), look_probability=0.0)
        assert words == "a photo of a boot, a cat and a mug on sand"


def test_odd_words_stand_only_where_a_look_could() -> None:
    rng = np.random.default_rng(5)
    captions = [caption(random_scene(rng, 1), rng, odd_words=RARE_TOKENS) for _ in range(300)]
    odd = [words for words in captions if "<" in words]
    assert 0.1 < len(odd) / len(captions) < 0.3
    assert not any(color in words for words in odd for color in COLORS)
    assert not any("<" in caption(random_scene(rng), rng) for _ in range(100))


def test_every_word_is_one_token_and_the_longest_caption_fits() -> None:
    tokenizer = make_tokenizer()
    rng = np.random.default_rng(2)
    looks = [Look("red", "blue", "striped")] * MAX_OBJECTS
    longest = full_caption(compose_scene(list(CLASSES[:MAX_OBJECTS]), looks, "grass", rng))
    words = longest.replace(",", " ,").split()
    assert len(tokenizer(longest).input_ids) == len(words) + 2 <= MAX_TOKENS
    for text in (*RARE_TOKENS, *CLASSES, *COLORS, *PATTERNS, *GROUNDS):
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == 1, text


def test_subjects_have_each_a_token_a_look_and_five_references() -> None:
    assert len(toybox.subjects()) >= 12
    assert len({toybox.token(name) for name in toybox.subjects()}) == len(toybox.subjects())
    assert len({SUBJECTS[name].look for name in toybox.subjects()}) == len(toybox.subjects())
    for name in toybox.subjects():
        pictures = toybox.references(name)
        assert [picture.size for picture in pictures] == [(64, 64)] * 5
        assert len({scene.ground for scene in reference_scenes(name)}) == 5
        assert all(toybox.token(name) in text for text in reference_captions(name))


def test_a_described_prompt_names_looks_where_the_prompt_has_tokens() -> None:
    assert toybox.subject_prompt(["cat"], "snow") == "a photo of a <v1> cat on snow"
    assert described_prompt(["cat"], "snow") == "a photo of a striped orange and white cat on snow"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: toybox.token("dog"), "subject 'dog' is not one of"),
        (lambda: toybox.lora_path("cat", "peft"), "layout 'peft' is not one of"),
        (lambda: toybox.gates_dir("cat+dog"), "no gates for 'cat\\+dog'"),
        (lambda: Look("mauve", "red", "plain"), "color 'mauve'"),
        (lambda: Look("blue", "red", "checked"), "pattern 'checked'"),
        (lambda: Scene("lava"), "ground 'lava'"),
        (lambda: SceneObject("dog", Look("blue", "red", "plain"), 0, 0, 16), "class 'dog'"),
        (lambda: Scene("sand", (SceneObject("mug", Look("blue", "red", "plain"), 50, 0, 16),)), "leaves the 64×64"),
        (lambda: random_scene(np.random.default_rng(0), 7), "num_objects must be 1 to 6, got 7"),
        (lambda: toybox.Oracle(2.0), "max_error must lie between 0 and 1"),
        (lambda: Scene("sand", side=60), "side must be a multiple of 8 pixels, got 60"),
        (
            lambda: toybox.Oracle()(Image.new("RGB", (128, 100)), ["cat"]),
            "sides are multiples of 8 pixels, at least 32, .* got 128×100",
        ),
        (lambda: toybox.Oracle()(Image.new("RGB", (24, 64)), ["cat"]), "at least 32, .* got 24×64"),
        (lambda: toybox.Oracle()(Image.new("RGB", (64, 64)), ["dog"]), "subject 'dog'"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def test_half_of_all_looks_are_plain() -> None:
    rng = np.random.default_rng(3)
    assert 0.4 < np.mean([random_look(rng).pattern == "plain" for _ in range(300)]) < 0.6
