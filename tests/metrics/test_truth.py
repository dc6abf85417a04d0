"""Omission and confusion against rendered truth, and the gates' report against the definitions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mole_diffusion import toybox
from mole_diffusion.metrics import ConceptPresence, GateReport, concept_presence, gate_statistics, oracle_detector
from mole_diffusion.toybox import Look, Scene
from mole_diffusion.toybox.subjects import SUBJECTS
from mole_diffusion.toybox.world import compose_scene
from tests.composing import NAMES, composing_pipeline, draw

CONCEPTS = ["cat", "boot", "teapot"]
SCENES = 24


def scene(rng: np.random.Generator, concepts: list[str] = CONCEPTS) -> Scene:
    subjects = [SUBJECTS[name] for name in concepts]
    return compose_scene([s.class_name for s in subjects], [s.look for s in subjects], "grass", rng)


def spoilt(rng: np.random.Generator) -> tuple[Image.Image, dict[str, float]]:
    """A scene with objects taken out or looks exchanged on purpose, and what is true of it."""
    whole = scene(rng)
    kind = rng.integers(3)
    objects = list(whole.objects)
    omitted = confused = 0
    if kind == 1:
        omitted = int(rng.integers(1, 3))
        del objects[:omitted]
    elif kind == 2:  # the first two exchange looks
        confused = 2
        first, second = objects[:2]
        objects[:2] = [replace(first, look=second.look), replace(second, look=first.look)]
    truth = {
        "presence rate": 1 - (omitted + confused) / 3,
        "omission rate": omitted / 3,
        "confusion rate": confused / 3,
        "all-present rate": float(kind == 0),
        "count error": float(omitted),
    }
    return toybox.render(replace(whole, objects=tuple(objects))), truth


def test_rates_agree_with_rendered_truth() -> None:
    rng = np.random.default_rng(0)
    images, truths = zip(*(spoilt(rng) for _ in range(SCENES)), strict=True)
    metric = ConceptPresence()
    metric.update(images, [CONCEPTS] * SCENES)
    expected = {name: float(np.mean([truth[name] for truth in truths])) for name in truths[0]}
    assert 0 < expected["omission rate"] < 1
    assert 0 < expected["confusion rate"] < 1
    assert metric.compute() == pytest.approx(expected, abs=1e-9)


def test_another_look_on_a_concept_and_its_look_on_a_stranger_are_confusions() -> None:
    oracle = toybox.Oracle()
    whole = scene(np.random.default_rng(1))
    stranger = replace(whole.objects[2], class_name="mug", look=whole.objects[0].look)  # a mug in the cat's look
    found = oracle.detect([toybox.render(replace(whole, objects=(*whole.objects[:2], stranger)))])[0]
    assert concept_presence(found, CONCEPTS) == {
        "presence rate": 2 / 3,
        "omission rate": 1 / 3,
        "confusion rate": 1 / 3,
        "all-present rate": 0.0,
        "count error": 0.0,
    }
    repainted = replace(whole.objects[0], look=Look("green", "pink", "dotted"))  # nobody's
    found = oracle.detect([toybox.render(replace(whole, objects=(repainted, *whole.objects[1:])))])[0]
    assert concept_presence(found, CONCEPTS) == {
        "presence rate": 2 / 3,
        "omission rate": 0.0,
        "confusion rate": 1 / 3,
        "all-present rate": 0.0,
        "count error": 0.0,
    }
    with pytest.raises(ValueError, match="there is no concept to look for"):
        concept_presence(found, [])
    with pytest.raises(ValueError, match="there are 1 pictures and 2 lists of concepts"):
        ConceptPresence(oracle).update([toybox.render(whole)], [CONCEPTS, CONCEPTS])


def test_the_oracle_is_a_detector_of_regions() -> None:
    whole = scene(np.random.default_rng(2))
    image = toybox.render(whole)
    detector = oracle_detector()
    assert [detector(image, name) for name in CONCEPTS] == [item.box for item in whole.objects]
    assert detector(image, "mug") is None


def test_gate_statistics_are_the_definitions() -> None:
    gates = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    share, entropy, effective = gate_statistics(gates)
    torch.testing.assert_close(share, gates.double())
    for row, h, e in zip(gates.tolist(), entropy.tolist(), effective.tolist(), strict=True):
        naive = -sum(g * math.log(g) for g in row if g > 0)
        assert (h, e) == pytest.approx((naive, math.exp(naive)), abs=1e-6)
    for less, same in zip(
        gate_statistics(0.3 * gates), (share, entropy, effective), strict=True
    ):  # a null expert's rest
        torch.testing.assert_close(less, same, atol=1e-7, rtol=0)
    assert gate_statistics(torch.zeros(1, 3)).share.tolist() == [[0, 0, 0]]
    with pytest.raises(ValueError, match="none below zero"):
        gate_statistics(torch.tensor([[1.5, -0.5]]))


def test_the_report_has_every_place_and_step() -> None:
    pipe: Any = composing_pipeline(*NAMES)
    gates = pipe.init_gates()
    with torch.no_grad():
        for parameter in gates.gate_parameters():
            parameter.normal_(generator=torch.manual_seed(0))
    with gates.record(accumulate=True) as record:
        draw(pipe, num_inference_steps=3)
    report = GateReport(record.names, NAMES, steps=3)
    report.update(record)
    result = report.compute()
    place = record.names[-1]
    rows = torch.cat(record.by_pass[place]).double()
    rows = rows / rows.sum(dim=-1, keepdim=True)  # which fp32 gates do to 1e-7
    assert result[f"{place}: share of dog"] == pytest.approx(rows[:, 1].mean().item(), abs=1e-9)
    at_step = torch.cat([record.by_pass[p][1] for p in record.names if not p.startswith("text_encoder")]).double()
    entropy = -(at_step * at_step.clamp(min=1e-300).log()).sum(-1)
    assert result["step 1: entropy"] == pytest.approx(entropy.mean().item(), abs=1e-6)
    assert result["step 1: effective LoRAs"] == pytest.approx(entropy.exp().mean().item(), abs=1e-6)
    with pytest.raises(ValueError, match=r"has 3 passes at .* and this report is for 4 steps"):
        GateReport(record.names, NAMES, steps=4).update(record)
    with pytest.raises(ValueError, match="this report is for"):
        GateReport(record.names, ["a", "b", "c"], steps=3).update(record)
