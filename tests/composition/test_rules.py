"""The rules that say whose pixel and whose word is whose, against their literal transcriptions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mole_diffusion.composition import COMPOSITIONS, Budget, Masks, RegionMap
from mole_diffusion.composition.attention import attention_probabilities
from mole_diffusion.composition.freefuse import CORE, freefuse_owners
from mole_diffusion.composition.owners import owners, z_scores
from tests import reference
from tests.composing import NAMES, composing_pipeline, lora_states

EVERYBODY = torch.ones(1, 3, dtype=torch.bool)


@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("background", [-10.0, 0.3, 1.0])
def test_pixels_go_to_the_largest_z_score(side: int, background: float) -> None:
    maps = torch.rand(2, 3, 5, 6, dtype=torch.float64) * torch.tensor([1.0, 100.0, 0.01]).view(1, 3, 1, 1)
    found = owners(maps, EVERYBODY, background=background, smoothing=side)
    for row in range(2):
        expected = reference.owner_of_pixels(maps[row], background, side)
        for y, line in enumerate(expected):
            for x, owner in enumerate(line):
                one_hot = [float(i == owner) for i in range(3)]
                assert found[row, :, y, x].tolist() == one_hot


def test_owners_do_not_depend_on_scale_and_masked_loras_own_nothing() -> None:
    maps = torch.rand(1, 3, 4, 4)
    found = owners(maps, EVERYBODY, background=0.2, smoothing=3)
    scaled = maps * torch.tensor([0.001, 7.0, 300.0]).view(1, 3, 1, 1)
    assert torch.equal(owners(scaled, EVERYBODY, background=0.2, smoothing=3), found)
    part = torch.tensor([[True, False, True]])
    without = owners(maps, part, background=0.2, smoothing=3)
    assert not without[:, 1].any()
    assert without[:, 0].sum() >= found[:, 0].sum()
    assert torch.equal(z_scores(torch.full((1, 4, 4), 0.25)), torch.zeros(1, 4, 4))  # says nothing


def test_attention_is_a_softmax_over_words_averaged_over_heads() -> None:
    query, key = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3, 7, 4, dtype=torch.float64)
    found = attention_probabilities(query, key, 0.5)
    for row in range(2):
        for pixel in range(5):
            heads = [
                reference.softmax([0.5 * float(query[row, h, pixel] @ key[row, h, w]) for w in range(7)])
                for h in range(3)
            ]
            expected = [sum(head[w] for head in heads) / 3 for w in range(7)]
            assert found[row, pixel].tolist() == pytest.approx(expected, abs=1e-6)


def test_freefuse_follows_likeness_to_the_core() -> None:
    scores, outputs = torch.rand(1, 3, 5, 8), torch.randn(1, 40, 6)
    # Without a background, likeness and its smoothing alone decide.
    found = freefuse_owners(scores, None, [outputs], EVERYBODY, factor=1)
    assert torch.equal(found.sum(dim=1), torch.ones(1, 5, 8))
    likeness = reference.freefuse_likeness(scores[0].flatten(1), outputs[0], CORE)
    sure = 0
    for pixel in range(40):
        values = sorted((likeness[c][pixel] for c in range(3)), reverse=True)
        if values[0] - values[1] > 1 + 2:  # more than neighbours (1) and distances (at most 2) can turn
            best = max(range(3), key=lambda c: likeness[c][pixel])
            assert found[0, best].flatten()[pixel] == 1
            sure += 1
    swapped = freefuse_owners(scores[:, [1, 0, 2]], None, [outputs], EVERYBODY, factor=1)
    assert torch.equal(swapped[:, [1, 0, 2]], found)


def test_freefuse_does_not_force_equal_areas() -> None:
    # Two looks, one on a single column: its owner gets that column and no more.
    outputs = torch.zeros(1, 64, 2)
    outputs[:, :, 0] = 1
    column = torch.arange(64) % 8 == 0
    outputs[:, column] = torch.tensor([0.0, 1.0])
    scores = torch.stack([(~column).float(), column.float()]).view(1, 2, 8, 8) + 0.01
    part = torch.ones(1, 2, dtype=torch.bool)
    found = freefuse_owners(scores, None, [outputs], part, factor=1)
    assert found[0, 1].sum() == 8


# --- weights in the model -----------------------------------------------------------------------------------------


def weights_seen(pipe: Any, loras: Any = None, **kwargs: Any) -> dict[str, Tensor]:
    """The weights at every module in the last step of a call."""
    seen: dict[str, Tensor] = {}
    method = pipe.composition
    weigh = type(method).weigh

    class Seen(type(method)):  # type: ignore[misc]
        def weigh(self, site: Any, projections: Any, run: Any) -> Tensor | None:
            weights = weigh(self, site, projections, run)
            if weights is not None:
                seen[site.name] = weights
            return weights

    method.__class__ = Seen
    try:
        options = {"num_inference_steps": 4, "output_type": "latent", "generator": torch.manual_seed(0)} | kwargs
        pipe("a photo of a cat, a red dog and a mug", loras=loras, **options)
    finally:
        method.__class__ = Seen.__bases__[0]
    return seen


REGIONS = {"cat": (0, 0, 0.5, 0.5), "dog": (0.5, 0, 1, 0.5), "mug": (0, 0.5, 1, 1)}
# Of the start of the text, "a photo of a cat, a red dog and a mug", and its end.
OWNERS: list[int | None] = [None] * 5 + [0, None, None, 1, 1, None, None, 2, None, None, None]


@torch.no_grad()
def test_words_pixels_and_vectors_have_the_weights_of_the_rule(pipe: Any) -> None:
    pipe.set_composition("masks")
    seen = weights_seen(pipe, regions=REGIONS)
    region_map = pipe.masks
    words = torch.tensor([[reference.weight_of_word(i, owner, (0, 1, 2)) for i in range(3)] for owner in OWNERS])
    neutral = torch.full((16, 3), 1 / 3)
    checked = set()
    for name, weights in seen.items():
        site = pipe.experts.sites[name]
        if site.reads == "text":
            torch.testing.assert_close(weights, torch.stack([neutral, words]))  # the negative prompt is nobody's
            checked.add("words")
        elif site.component == "unet":
            size = int(weights.shape[1] ** 0.5)
            torch.testing.assert_close(weights[-1], region_map.at(size, size)[0])
            checked.add("pixels")
    assert checked == {"words", "pixels"}


@torch.no_grad()
def test_a_style_acts_everywhere_but_on_subjects_words_and_a_utility_everywhere() -> None:
    pipe = composing_pipeline()
    pipe.load_loras(lora_states(pipe), triggers={"dog": "red dog"}, roles={"dog": "style", "mug": "utility"})
    pipe.set_composition("masks")
    seen = weights_seen(pipe, loras={"cat": 1.0, "dog": 0.5, "mug": 0.25}, regions={"cat": (0, 0, 0.5, 1)})
    for name, weights in seen.items():
        site = pipe.experts.sites[name]
        assert torch.equal(weights[..., 2], torch.full_like(weights[..., 2], 0.25))
        if site.reads == "text":
            cat_word, dog_words = weights[-1, 5], weights[-1, 8:10]
            assert cat_word[:2].tolist() == [1.0, 0.0]
            assert dog_words[:, :2].tolist() == [[0.0, 0.5]] * 2
            assert weights[-1, 2, :2].tolist() == [1.0, 0.5]  # one subject alone has the whole of a neutral word
        elif site.component == "unet":
            assert torch.equal(weights[..., 1], torch.full_like(weights[..., 1], 0.5))


@torch.no_grad()
def test_a_budget_scales_another_methods_weights_by_the_energy_of_the_stack(pipe: Any) -> None:
    pipe.set_composition(Budget())
    seen = weights_seen(pipe, loras={"cat": 1.0, "dog": 0.5, "mug": 1.0})
    for name, weights in seen.items():
        site = pipe.experts.sites[name]
        factors = [lora.factors.get(site.component, {}).get(site.module_name) for lora in pipe.experts.loras]
        changes = [None if f is None else f.delta().double() for f in factors]
        given = torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64)
        summed = sum(w * change for w, change in zip(given, changes, strict=True) if change is not None)
        loudest = max(float(w * c.norm()) for w, c in zip(given, changes, strict=True) if c is not None)
        scale = min(1.0, loudest / float(summed.norm()))
        torch.testing.assert_close(weights.double(), (given * scale)[None, None], atol=1e-6, rtol=1e-6)
    pipe.set_composition(Budget(Masks(online=True)))
    assert "words" in pipe.composition.needs
    weights_seen(pipe)
    assert isinstance(pipe.masks, RegionMap)


def test_every_name_of_the_room_is_a_method_that_can_be_made() -> None:
    assert all(COMPOSITIONS[name]().name == name for name in COMPOSITIONS)
    assert NAMES == ("cat", "dog", "mug")
