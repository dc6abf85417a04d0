"""Regions that a user gives, alone and beside found ones: forms, words of their own, masks of an earlier call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mole_diffusion.composition import Masks, RegionMap
from tests.composing import assert_close
from tests.composition.binding import REGIONS, four, fresh, generators


@pytest.fixture(scope="module")
def pipe() -> Any:
    return fresh()


def test_masks_of_several_pictures_are_given_again_picture_by_picture(pipe: Any) -> None:
    pipe.set_composition("masks")
    halves = torch.zeros(2, 3, 4, 4)
    halves[0, 0, :, :2], halves[1, 0, :, 2:] = 1, 1
    halves[:, 1] = 1 - halves[:, 0]
    names = ("cat", "dog", "mug")

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    both = four(pipe, generator=generators(), num_images_per_prompt=2, regions=RegionMap(halves, names))
    for row in range(2):
        own = RegionMap(halves[row : row + 1], names)
        assert_close(both[row : row + 1], four(pipe, generator=generators()[row], regions=own))
    with pytest.raises(ValueError, match="the region map given has 2 rows, but this call draws 4"):
        four(pipe, num_images_per_prompt=4, regions=RegionMap(halves, names))


def test_masks_of_a_call_can_be_given_again(pipe: Any) -> None:
    pipe.set_composition("masks")
    first = four(pipe, seed=2)
    masks = pipe.masks
    assert masks.names == ("cat", "dog", "mug")
    counted: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda *_: counted.append(1))
    again = four(pipe, seed=2, regions=masks)
    handle.remove()
    assert len(counted) == 4  # nothing to look for
    # The same regions; given ones draw subjects' words to them harder, so only with that as for found ones is it equal.
    pipe.set_composition(Masks(given_own_words=3.0, given_others_words=6.0))
    assert_close(four(pipe, seed=2, regions=masks), first)
    assert not torch.equal(again, first)
    pipe.set_composition("linear")
    with pytest.raises(ValueError, match=r"'linear' weighs every pixel alike, so `regions` would do nothing.*masks"):
        four(pipe, regions=masks)


def test_given_and_found_regions_mix(pipe: Any) -> None:
    pipe.set_composition("masks")
    four(pipe, regions={"dog": (0.5, 0, 1, 1)})
    masks = pipe.masks
    assert masks.fixed == ("dog",)
    inside, outside = masks.values[0, :, :, 10:], masks.values[0, :, :, :6]
    assert torch.equal(inside[1], torch.ones_like(inside[1]))
    assert not inside[0].any()
    assert not inside[2].any()
    assert not outside[1].any()
    assert outside[0].any()


def test_with_every_region_given_a_call_needs_no_words_and_no_prior(pipe: Any) -> None:
    pipe.set_composition("masks")
    counted: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda *_: counted.append(1))
    four(pipe, "a photo on grass", regions=REGIONS)
    handle.remove()
    assert len(counted) == 4


def test_painted_masks_boxes_and_polygons_of_one_place_are_one_region(pipe: Any) -> None:
    pipe.set_composition("masks")
    left = np.zeros((32, 32), bool)
    left[:, :16] = True
    forms: list[Any] = [
        (0, 0, 0.5, 1),
        (0, 0, 16, 32),
        [(0, 0), (0.5, 0), (0.5, 1), (0, 1)],
        left,
        Image.fromarray(left),
    ]
    drawn = [four(pipe, loras=["cat", "dog"], regions={"cat": form, "dog": (0.5, 0, 1, 1)}) for form in forms]
    for other in drawn[1:]:
        assert_close(other, drawn[0])


def test_a_region_may_have_words_of_its_own(pipe: Any) -> None:
    pipe.set_composition("masks")
    box = (0, 0, 0.5, 1)
    with_words: Any = {"cat": {"region": box, "prompt": "a red cat"}, "dog": (0.5, 0, 1, 1)}
    options: dict[str, Any] = {"loras": ["cat", "dog"], "seed": 1}
    shapes: list[tuple[int, ...]] = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["encoder_hidden_states"].shape)), with_kwargs=True
    )
    drawn = four(pipe, "a photo on grass", regions=with_words, **options)
    handle.remove()
    assert set(shapes) == {(2, 32, 32)}  # twice the tokens
    other = {**with_words, "cat": {"region": box, "prompt": "a blue cat"}}
    assert not torch.equal(four(pipe, "a photo on grass", regions=other, **options), drawn)
    assert torch.equal(four(pipe, "a photo on grass", regions=with_words, **options), drawn)
    batch = four(pipe, ["a photo on grass"] * 2, regions=with_words, **options | {"generator": generators(1, 1)})
    assert_close(batch, torch.cat([drawn, drawn]))
    with pytest.raises(ValueError, match=r"`regions` of 'cat' has the keys \['box'\]"):
        four(pipe, regions={"cat": {"box": box}})


def test_words_repeated_for_negative_prompts_change_nothing() -> None:
    query, key, value = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (5, 7, 7))
    once = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    again = torch.nn.functional.scaled_dot_product_attention(query, key.repeat(1, 1, 3, 1), value.repeat(1, 1, 3, 1))
    torch.testing.assert_close(once, again)
