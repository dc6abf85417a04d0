"""Anonymous subjects: others than those with names, one command, usable wherever a name is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mole_diffusion import MoLEStableDiffusionPipeline, toybox
from mole_diffusion.cli import app
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
    make_anonymous("no such base", tmp_path, count=1, seed=0, device=torch.device("cpu"), num_steps=2)
    assert lora.read_bytes() == bytes_before


def test_a_folder_of_other_subjects_is_not_taken_for_these(tmp_path: Path) -> None:
    item, other = draw_anonymous(1)[0], draw_anonymous(1, seed=7)[0]
    arguments = ["toybox", "anonymous", "--count", "1", "--steps", "2", "--out", str(tmp_path)]
    file = tmp_path / item.name / "subject.json"
    file.parent.mkdir()
    for content, said in ((subject_entries(other), "is of another subject"), (["damaged"], "is of another subject")):
        file.write_text(json.dumps(content))
        result = CliRunner().invoke(app, arguments)
        assert (result.exit_code, said in result.output) == (2, True), result.output
    result = CliRunner().invoke(app, [*arguments, "--base", str(tmp_path)])
    assert (result.exit_code, "is of another subject" in result.output) == (2, True), result.output
    file.unlink()
    result = CliRunner().invoke(app, [*arguments, "--base", str(tmp_path)])
    assert (result.exit_code, f"the base model {tmp_path} cannot be loaded" in result.output) == (2, True)


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        toybox.AnonymousSubjectsError, match="count must be 1 to 156, as many as there are looks, got 157"
    ):
        draw_anonymous(157)
    with pytest.raises(
        toybox.AnonymousSubjectsError, match=r"no anonymous subject lies in .*mole toybox anonymous --out"
    ):
        toybox.anonymous_subjects(tmp_path)
