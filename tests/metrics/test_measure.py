"""The numbers of each picture, as the library itself takes them from the metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mole_diffusion import toybox
from mole_diffusion.metrics import ConceptPresence, ImageAlignment, RegionAlignment, oracle_detector
from mole_diffusion.metrics.features import SharedEncoder, embed_images
from mole_diffusion.toybox.oracle import Oracle

SUBJECTS = ("cat", "boot")


class Colours:
    """Mean colours of quarters, as features; counts the pictures that it sees."""

    def __init__(self) -> None:
        self.seen = 0

    def encode_image(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return torch.nn.functional.normalize(torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1), dim=-1)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [toybox.references(name)[0] for name in SUBJECTS]


def test_the_mean_of_measure_is_what_update_counts(pictures: list[Image.Image]) -> None:
    references = {name: toybox.references(name)[:1] for name in SUBJECTS}
    oracle = Oracle()
    for metric in (
        ImageAlignment(Colours(), references),
        RegionAlignment(Colours(), references, oracle_detector(oracle)),
        ConceptPresence(oracle),
    ):
        asked = [["cat"], ["boot"]]
        each = metric.measure(pictures, asked)
        assert each.shape == (2, len(metric.names))
        assert not metric.update_called  # it counted nothing
        metric.update(pictures, asked)
        assert list(metric.means().values()) == pytest.approx(np.nanmean(each.double().numpy(), axis=0).tolist())


def test_a_shared_encoder_sees_each_picture_once(pictures: list[Image.Image]) -> None:
    colours = Colours()
    shared = SharedEncoder(colours, remembers=3)
    first = embed_images(shared, pictures)
    assert torch.equal(first, embed_images(Colours(), pictures))
    assert torch.equal(embed_images(shared, pictures[::-1]), first.flip(0))
    assert colours.seen == 2
    other = [picture.rotate(90) for picture in pictures]
    assert not torch.equal(embed_images(shared, other), first)  # no room for these beside the others
    assert torch.equal(embed_images(shared, pictures), first)
    assert colours.seen == 6


def test_the_oracle_looks_at_a_picture_once(pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, looked = Oracle(), []
    look = oracle._detect
    monkeypatch.setattr(oracle, "_detect", lambda pixels: looked.append(pixels) or look(pixels))
    found = oracle.detect(pictures)
    found[0].clear()  # what it handed out is not what it remembers
    again = oracle.detect(pictures)
    assert len(looked) == 2
    assert again[0]
    assert again[1] == found[1]
