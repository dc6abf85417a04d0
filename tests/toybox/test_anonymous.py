"""Anonymous subjects: others than those with names, one command, usable wherever a name is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mole_diffusion import MoLEStableDiffusionPipeline, toybox
from mole_diffusion.cli import app
from mole_diffusion.errors import MoLEError
from mole_diffusion.toybox.anonymous import draw_anonymous, subject_entries
from mole_diffusion.toybox.recipe.anonymous import make_anonymous
from mole_diffusion.toybox.shapes import CLASSES
from mole_diffusion.toybox.subjects import SUBJECTS, reference_scenes


def test_anonymous_subjects_wear_looks_of_nobody_else() -> None:
    drawn = draw_anonymous(24)
    looks = [item.look for item in (*drawn, *SUBJECTS.values())]
    assert len(set(looks)) == len(looks)
    assert {item.class_name for item in drawn[:16]} == set(CLASSES)
    assert len({item.name for item in drawn}) == 24
    for first in drawn:
        for second in (*drawn, *SUBJECTS.values()):
            # What can stand in one scene has two tokens.
            assert (first.token == second.token) == (second in drawn and first.class_name == second.class_name)
    assert draw_anonymous(6) == drawn[:6]
    assert draw_anonymous(6, seed=1) != drawn[:6]


def test_a_subject_stands_where_a_name_does() -> None:
    item = draw_anonymous(1)[0]
    assert (
        toybox.subject_prompt([item, "cat"], "snow")
        == f"a photo of a {item.token} {item.class_name} and a <v1> cat on snow"
    )
    assert str(item.look) in toybox.described_prompt([item], "snow")
    assert toybox.concept(item).token == toybox.token(item) == item.token
    picture = toybox.render(reference_scenes(item)[0])
    found = toybox.Oracle()(picture, [item, "cat"])
    assert (found[item.name].present, found["cat"].present) == (True, False)
    assert len(toybox.references(item)) == 5


def test_one_command_makes_them_and_a_second_run_finds_them_done(tmp_path: Path) -> None:
    arguments = ["toybox", "anonymous", "--count", "1", "--steps", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    [(item, lora)] = toybox.anonymous_subjects(tmp_path).values()
    assert [item] == draw_anonymous(1)
    assert f"{item.name}: {item.token} {item.class_name}, {item.look}" in result.output
    pictures = [Image.open(file) for file in sorted(lora.parent.glob("reference-*.png"))]
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in toybox.references(item)]
    pipe = MoLEStableDiffusionPipeline.from_pretrained(toybox.base_dir())
    pipe.load_loras({item.name: lora})
    bytes_before = lora.read_bytes()
    again: dict[str, Any] = {"count": 1, "seed": 0, "device": torch.device("cpu"), "num_steps": 2}
    make_anonymous(toybox.base_dir(), tmp_path, **again)
    assert lora.read_bytes() == bytes_before
    other = shutil.copytree(toybox.base_dir(), tmp_path / "other" / "base")
    scheduler = other / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text(encoding="utf-8")) | {"beta_end": 0.5}))
    said = (
        r"lora\.safetensors was trained with something else: `steps` is 2 there and 3 here; not the same: the base's s"
    )
    with pytest.raises(MoLEError, match=said):
        make_anonymous(other, tmp_path, **again | {"num_steps": 3})
    lora.unlink()
    with pytest.raises(MoLEError, match=r"lora\.safetensors"):
        make_anonymous(toybox.base_dir(), tmp_path, **again)


def test_a_folder_of_other_subjects_is_not_taken_for_these(tmp_path: Path) -> None:
    item, other = draw_anonymous(1)[0], draw_anonymous(1, seed=7)[0]
    arguments = ["toybox", "anonymous", "--count", "1", "--steps", "2", "--out", str(tmp_path)]
    file = tmp_path / item.name / "subject.json"
    file.parent.mkdir()
    for content, said in ((["damaged"], "is no subject: no object"), (subject_entries(other), "is of another subject")):
        file.write_text(json.dumps(content))
        result = CliRunner().invoke(app, arguments)
        assert (result.exit_code, said in result.output) == (2, True), result.output
    result = CliRunner().invoke(app, [*arguments, "--base", str(tmp_path)])
    assert (result.exit_code, "is of another subject" in result.output) == (2, True), result.output
    file.unlink()
    result = CliRunner().invoke(app, [*arguments, "--base", str(tmp_path)])
    assert (result.exit_code, f"the base model {tmp_path} cannot be loaded" in result.output) == (2, True)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda file: file.write_text(""), "is not JSON"),
    "cut": (lambda file: file.write_text(file.read_text()[:20]), "is not JSON"),
    "deep": (lambda file: file.write_text("[" * 100_000), "nest"),
    "no text": (lambda file: file.write_bytes(b"\xff\xfe\x00"), "not a text"),
    "a pipe": (lambda file: (file.unlink(), os.mkfifo(file)), "a pipe, not a file"),
    "a list": (lambda file: file.write_text("[]"), "no object with name"),
    "no seed": (lambda file: change(file, seed=None), "no object with name"),
    "a true seed": (lambda file: change(file, seed=True), "no object with name"),
    "a look of lists": (
        lambda file: change(file, look={"primary": [], "secondary": "red", "pattern": "plain"}),
        "look",
    ),
    "half a look": (lambda file: change(file, look={"primary": "red"}), "`look` is not of"),
    "no such colour": (
        lambda file: change(file, look={"primary": "grey", "secondary": "red", "pattern": "plain"}),
        "color 'grey' is not one of",
    ),
    "no such class": (lambda file: change(file, class_name="dragon"), "there is no class 'dragon'"),
}


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | entries))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_subject_is_named(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x" / "subject.json"
    file.parent.mkdir()
    file.write_text(json.dumps(subject_entries(draw_anonymous(1)[0])))
    assert len(toybox.anonymous_subjects(tmp_path)) == 1
    damage, message = DAMAGE[kind]
    damage(file)
    with pytest.raises(toybox.AnonymousSubjectsError, match=message) as caught:
        toybox.anonymous_subjects(tmp_path)
    assert str(file) in str(caught.value)


def test_two_folders_of_one_subject_are_said(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "subject.json").write_text(json.dumps(subject_entries(draw_anonymous(1)[0])))
    with pytest.raises(toybox.AnonymousSubjectsError, match="both hold the subject"):
        toybox.anonymous_subjects(tmp_path)


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        toybox.AnonymousSubjectsError, match="count must be 1 to 156, as many as there are looks, got 157"
    ):
        draw_anonymous(157)
    with pytest.raises(
        toybox.AnonymousSubjectsError, match=r"no anonymous subject lies in .*mole toybox anonymous --out"
    ):
        toybox.anonymous_subjects(tmp_path)
