"""The metrics as users of torchmetrics know metrics: keywords, tensors, plots, wrappers, precision, processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.wrappers import BootStrapper, MetricTracker, MinMaxMetric, Running

from mole_diffusion import toybox
from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.errors import MoLEError
from mole_diffusion.metrics import (
    ConceptPresence,
    GateReport,
    ImageAlignment,
    RegionAlignment,
    TextAlignment,
    VisionBackbone,
    oracle_detector,
)
from tests import forked
from tests.fork_server import ForkServer

PROMPTS = ["a photo of a cat on grass", "a photo of a red boot on snow", "a photo of a cat on sand"]
REFERENCES = {"cat": toybox.references("cat"), "boot": toybox.references("boot")}
PICTURES = [*REFERENCES["cat"][:1], *REFERENCES["boot"][:1], *REFERENCES["cat"][1:2]]


def batch(kind: torch.dtype = torch.uint8) -> Tensor:
    pixels = torch.from_numpy(np.stack([np.array(picture) for picture in PICTURES])).permute(0, 3, 1, 2)
    return pixels if kind == torch.uint8 else (pixels / 255).to(kind)


def all_metrics(clip: Any, **options: Any) -> list[Any]:
    return [
        TextAlignment(clip, **options),
        ImageAlignment(clip, REFERENCES, **options),
        RegionAlignment(clip, REFERENCES, oracle_detector(), **options),
        ConceptPresence(**options),
        GateReport(["a"], ["cat", "boot"], 1, **options),
    ]


def update(metric: Any, images: Any) -> Any:
    if isinstance(metric, TextAlignment):
        metric.update(images, PROMPTS)
    elif isinstance(metric, ConceptPresence):
        metric.update(images, [["cat"], ["boot"], ["cat"]])
    else:
        metric.update(images)
    return metric.compute()


def test_keywords_of_every_metric(toybox_clip: DifferentiableCLIP) -> None:
    for metric in all_metrics(toybox_clip, sync_on_compute=False, compute_with_cache=False, dist_sync_on_step=True):
        assert metric.sync_on_compute is metric.compute_with_cache is False
        assert metric.dist_sync_on_step is True
    with pytest.raises(ValueError, match="Unexpected keyword arguments: `sync`"):
        TextAlignment(toybox_clip, sync=True)


def test_pictures_of_any_kind_give_the_same_tensors(toybox_clip: DifferentiableCLIP) -> None:
    for metric in all_metrics(toybox_clip)[:4]:
        expected = update(metric, PICTURES)
        assert all(isinstance(value, Tensor) and value.ndim == 0 for value in expected.values())
        kinds: list[Any] = [batch(), list(batch()), batch(torch.float32), list(batch(torch.float64)), tuple(PICTURES)]
        slow = isinstance(metric, RegionAlignment | ConceptPresence)  # the oracle looks at all of them alike
        for images in kinds[1:3] if slow else kinds:
            metric.reset()
            for name, value in update(metric, images).items():
                torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_one_picture_alone(toybox_clip: DifferentiableCLIP) -> None:
    expected = TextAlignment(toybox_clip)(PICTURES[:1], PROMPTS[:1])
    for image in (PICTURES[0], batch()[0], batch(torch.float32)[0]):
        assert TextAlignment(toybox_clip)(image, PROMPTS[0]) == pytest.approx(
            {k: v.item() for k, v in expected.items()}, abs=1e-6
        )
    with pytest.raises(TypeError, match="`prompts` must be a list of strings"):
        TextAlignment(toybox_clip).update(PICTURES, "a cat")


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 64, 64), MoLEError, r"of shape \(1, 64, 64\); they must be uint8, or floating point"),
        (torch.zeros(1, 1, 64, 64), MoLEError, r"must be uint8, or floating point in \[0, 1\], of shape \(3, height"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), MoLEError, "images are torch.int64"),
        (torch.full((3, 8, 8), 1.5), MoLEError, r"values from 1.5 to 1.5; they must lie in \[0, 1\]"),
        ([torch.zeros(3, 8, 8), "a.png"], TypeError, "got a list with str"),
        (torch.zeros(0, 3, 8, 8), MoLEError, "there is no picture to measure"),
    ],
)
def test_tensors_that_are_no_pictures(toybox_clip: DifferentiableCLIP, images: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ImageAlignment(toybox_clip, REFERENCES).update(images)


def test_half_precision_of_the_results_and_of_the_encoder(toybox_clip: DifferentiableCLIP) -> None:
    for metric in all_metrics(toybox_clip)[:4]:
        before = update(metric, PICTURES)
        assert metric.half().compute() == before  # a no-op, as in torchmetrics
        metric.set_dtype(torch.half)
        for name, value in metric.compute().items():
            assert value.dtype == torch.half
            assert value.item() == pytest.approx(before[name].item(), abs=1e-3)
        metric.set_dtype("torch.float64")
        assert metric.compute() == before
    with pytest.raises(MoLEError, match=r"floating-point type such as torch\.half, got torch\.int64"):
        metric.set_dtype(torch.int64)
    assert next(toybox_clip.parameters()).dtype == torch.float32


class Overflowing(nn.Module):
    """An encoder whose features overflow, as half precision makes some."""

    def encode_image(self, images: Tensor) -> Tensor:
        return torch.full((len(images), 4), float("nan"))


def test_what_overflows_is_no_mean() -> None:
    with pytest.raises(MoLEError, match="features of the pictures are not finite"):
        ImageAlignment(Overflowing(), REFERENCES).update(PICTURES)
    with pytest.raises(MoLEError, match="got a number that is infinite"):
        ConceptPresence().add(torch.full((1, 5), float("inf")))


def test_plots(toybox_clip: DifferentiableCLIP) -> None:
    with matplotlib.rc_context({"backend": "agg"}):
        text, image = TextAlignment(toybox_clip), ImageAlignment(toybox_clip, REFERENCES)
        values = [text(picture, prompt) for picture, prompt in zip(PICTURES, PROMPTS, strict=True)]
        figure, axes = text.plot(values)
        assert len(axes.lines[0].get_xdata()) == 3
        image.update(PICTURES)
        figure, axes = image.plot()
        assert len(axes.get_legend().get_texts()) == 3
        assert image.only("cat").plot(image.compute()["cat"]) is not None
        matplotlib.pyplot.close("all")
        assert figure is not None


def test_wrappers_and_collections(toybox_clip: DifferentiableCLIP) -> None:
    best = MinMaxMetric(TextAlignment(toybox_clip).only())
    seen = [best(picture, prompt)["raw"] for picture, prompt in zip(PICTURES, PROMPTS, strict=True)]
    assert best.compute()["max"] >= max(seen[-1], best.compute()["raw"])
    assert best.compute()["min"] <= best.compute()["max"]

    image = ImageAlignment(toybox_clip, REFERENCES)
    spread = BootStrapper(image.only("cat"), num_bootstraps=20)
    assert all(copied.metric.encoder is toybox_clip for copied in spread.metrics)
    torch.manual_seed(0)
    spread.update(batch())
    image.update(PICTURES)
    result = spread.compute()
    assert result["std"] > 0
    assert result["mean"].item() == pytest.approx(image.compute()["cat"].item(), abs=0.3)
    with pytest.raises(MoLEError, match="there is no number 'dog'; there are cat, boot, mean"):
        image.only("dog").compute()
    with pytest.raises(MoLEError, match="there is no number None; there are cat"):
        image.only().compute()

    for metric, texts in (
        (TextAlignment(toybox_clip).only(), PROMPTS),
        (ConceptPresence(), [["cat"], ["boot"], ["cat"]]),
        (ImageAlignment(toybox_clip, REFERENCES).only("cat"), [["cat"], ["boot"], ["cat"]]),
    ):
        again = BootStrapper(metric, num_bootstraps=2, sampling_strategy="multinomial")
        with pytest.raises(MoLEError, match="BootStrapper draws pictures again and not the texts that belong to them"):
            again.update(batch(), texts)

    both = MetricCollection({"text": TextAlignment(toybox_clip), "image": ImageAlignment(toybox_clip, REFERENCES)})
    both.update(images=PICTURES, prompts=PROMPTS)
    assert {"text alignment (cosine)", "cat", "boot", "mean"} <= {name.split("/")[-1] for name in both.compute()}

    copied = copy.deepcopy(image)
    copied.update(PICTURES[:1])
    assert copied.count.tolist() == [4, 4]
    assert image.count.tolist() == [3, 3]


class BlindOracle(toybox.Oracle):
    """Sees nothing, as the oracle does in an empty picture."""

    def detect(self, images: Any) -> Any:
        return [[] for _ in images]


def test_metrics_that_agree_at_first_stay_two_in_a_collection() -> None:
    both = MetricCollection({"blind": ConceptPresence(BlindOracle()), "seeing": ConceptPresence()})
    for picture in (Image.new("RGB", (64, 64), "white"), PICTURES[0]):
        both.update([picture], [["cat"]])
    found = both.compute()
    rates = {name: value.item() for name, value in found.items() if "presence rate" in name}
    assert sorted(rates.values()) == [0.0, 0.5]
    alone = ConceptPresence()
    same = MetricCollection({name: alone.only(f"{name} rate") for name in ("presence", "omission")})
    same.update(PICTURES[:1], [["cat"]])
    assert {name: value.item() for name, value in same.compute().items()} == {"presence": 1, "omission": 0}


def test_one_number_of_several_in_every_wrapper(toybox_clip: DifferentiableCLIP) -> None:
    both = MetricCollection(
        {"text": TextAlignment(toybox_clip).only(), "cat": ImageAlignment(toybox_clip, REFERENCES).only("cat")}
    )
    tracker = MetricTracker(both, maximize=[True, True])
    tracker.increment()
    tracker.update(images=PICTURES, prompts=PROMPTS)  # each metric takes what it knows
    alone = {"text": next(iter(update(TextAlignment(toybox_clip), PICTURES).values()))}
    alone["cat"] = update(ImageAlignment(toybox_clip, REFERENCES), PICTURES)["cat"]
    assert tracker.compute() == alone
    assert tracker.best_metric() == {name: value.item() for name, value in alone.items()}

    latest = Running(TextAlignment(toybox_clip).only(), window=2)
    for picture, prompt in zip(PICTURES, PROMPTS, strict=True):
        latest.update(picture, prompt)
    last_two = TextAlignment(toybox_clip)
    last_two.update(PICTURES[1:], PROMPTS[1:])
    (expected,) = last_two.compute().values()
    assert latest.compute().item() == pytest.approx(expected.item(), abs=1e-5)  # embedded one by one, and together


def test_encoders_do_not_begin_to_drop_out(toybox_clip: DifferentiableCLIP) -> None:
    model = nn.ModuleDict({"text": TextAlignment(toybox_clip)}).train()
    assert model.training
    assert not any(part.training for part in toybox_clip.modules())
    backbone = VisionBackbone(nn.Sequential(nn.Dropout()), None)
    nn.ModuleList([backbone]).train()
    assert not any(part.training for part in backbone.modules())


def test_weights_are_not_moved_by_a_reset_and_states_are_saved(toybox_clip: DifferentiableCLIP) -> None:
    metric = ImageAlignment(toybox_clip, REFERENCES)
    metric.persistent(True)
    before = update(metric, PICTURES)
    other = ImageAlignment(toybox_clip, REFERENCES)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    other._update_count = 1
    assert other.compute() == before


def measured_by_one_process(rank: int) -> dict[str, float]:
    metric = ConceptPresence()
    if rank == 0:
        update(metric, PICTURES)
    return {name: value.item() for name, value in metric.compute().items()}


def test_a_process_that_measured_nothing_has_the_result_of_all(tmp_path: Path, fork_server: ForkServer) -> None:
    alone = {name: value.item() for name, value in update(ConceptPresence(), PICTURES).items()}
    found = fork_server.run(forked.ranks, tmp_path, __name__, measured_by_one_process.__name__)
    assert found == [alone, alone]


def test_measuring_does_not_change_what_was_given(toybox_clip: DifferentiableCLIP) -> None:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageAlignment(toybox_clip, REFERENCES).update(image)
    assert image.mode == "RGBA"
