"""Training gates from the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from mole_diffusion.app import training
from mole_diffusion.app.allowed_folders import AllowedFolders
from mole_diffusion.app.studio import Cancelled, Progress, Studio, Ticket
from mole_diffusion.drawing.settings import LoRASettings, PictureSettings
from mole_diffusion.errors import MoLEError
from tests.app.visitors import BOOT, BOTH, CAT, Impatient, note
from tests.tiny import random_lora, tiny_pipeline
from tests.tiny.clip import write_clip


def test_training_from_the_page_stops_and_goes_on(
    studio: Studio, tmp_path: Path, few_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mole_diffusion.training.gates.report.SEEDS", (0,))
    monkeypatch.setattr("mole_diffusion.training.gates.report.PROMPTS_SHOWN", 1)
    plan, config = training.plan(BOTH, "a photo of {concepts}", 5, 1, 2.0, "", "gates", AllowedFolders([tmp_path]))
    assert (config.steps, config.batch_size, config.guidance_scale) == (5, 1, 2.0)
    config = replace(config, identity_weight=0.0, rollout_steps=2, checkpoint_every=1)
    seen: list[Any] = []
    with pytest.raises(Cancelled):
        note(training.train(studio, plan, config, Impatient(after=4)), seen)
    assert [event.doing for event in seen[:2]] == [
        "opening toybox and the CLIP that guides",
        "drawing what each LoRA draws alone",
    ]
    numbers = [event.number for event in seen[2:]]
    assert 1 <= numbers[-1] < 5
    *steps, out = [event for event in training.train(studio, plan, config, Ticket()) if not isinstance(event, Progress)]
    assert steps[0].number == numbers[-1] + 1  # every step left a checkpoint
    assert steps[-1].number == 5
    assert out == tmp_path / "gates"
    assert (tmp_path / "gates" / "samples.png").is_file()


@pytest.mark.parametrize(
    ("settings", "templates", "message"),
    [
        (replace(BOTH, loras=(CAT,)), "{concepts}", "two LoRAs or more"),
        (replace(BOTH, base="me/mine"), "{concepts}", "the CLIP that guides is missing: only the toybox has its own"),
        (BOTH, " ", "there is no prompt"),
        (replace(BOTH, loras=(CAT, replace(BOOT, file="b", triggers=("v2",)))), "{concepts}", "token and its class"),
    ],
)
def test_what_cannot_be_trained_is_told(
    settings: PictureSettings, templates: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(MoLEError, match=message):
        training.plan(settings, templates, 5, 1, 2.0, "", "gates", AllowedFolders([tmp_path]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "."}, r"\. is the page's own folder"),
        ({"folder": " "}, "has no name"),
        ({"folder": "../gates"}, "outside of the folders"),
        ({"clip": "/etc"}, "outside of the folders"),
        ({"clip": "ViT-B-32:/etc/passwd"}, "open_clip has no weights ViT-B-32:/etc/passwd: it has openai"),
        ({"clip": "ViT-X:openai"}, "there is no such architecture"),
        ({"batch_size": 65}, "pictures a step must be a whole number from 1 to 64"),
        ({"guidance_scale": None}, "the guidance scale of training is empty"),
    ],
)
def test_a_training_stays_in_its_folders_and_bounds(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"steps": 5, "batch_size": 1, "guidance_scale": 2.0, "clip": "", "folder": "gates"}
    with pytest.raises(MoLEError, match=message):
        training.plan(BOTH, "{concepts}", allowed=AllowedFolders([tmp_path]), **{**given, **change})
    assert list(tmp_path.iterdir()) == []


def test_gates_train_on_another_base_with_a_clip_of_its_own(
    tmp_path: Path, few_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mole_diffusion.training.gates.report.SEEDS", (0,))
    base = tiny_pipeline()
    base.save_pretrained(tmp_path / "base")
    write_clip(tmp_path / "clip")
    loras = []
    for seed, (token, kind) in enumerate((("sks", "cat"), ("xyz", "dog"))):
        file = tmp_path / f"{kind}.safetensors"
        save_file(random_lora(base.components, seed=seed), file)
        loras.append(LoRASettings(kind, str(file), triggers=(f"{token} {kind}",)))
    settings = PictureSettings("gates", base=str(tmp_path / "base"), loras=tuple(loras))
    plan, config = training.plan(settings, "a {concepts}", 2, 2, 2.0, "clip", "gates", AllowedFolders([tmp_path]))
    assert (config.gradient_accumulation, config.gradient_checkpointing) == (2, True)  # a picture at a time
    *_, out = training.train(Studio("cpu"), plan, replace(config, rollout_steps=2, reference_pictures=1), Ticket())
    told = json.loads((out / "training.json").read_text())
    assert told["prompts"]["a a sks cat and a xyz dog"] == "a a cat and a dog"
    assert (out / "samples.png").is_file()


def test_float16_trains_nothing(tmp_path: Path) -> None:
    plan, config = training.plan(BOTH, "{concepts}", 5, 1, 2.0, "", "gates", AllowedFolders([tmp_path]))
    with pytest.raises(MoLEError, match="--dtype bfloat16"):
        next(training.train(Studio("cpu", "float16"), plan, config, Ticket()))
