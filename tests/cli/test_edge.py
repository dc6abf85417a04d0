"""The edge of the command line: a user's errors are one line, all others keep their traceback."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mole_diffusion import MoLEStableDiffusionPipeline, toybox
from mole_diffusion.cli import app
from mole_diffusion.cli.app import BAD_INPUT, main
from mole_diffusion.errors import MoLEError
from mole_diffusion.loading import LoadingError
from mole_diffusion.metrics import VisionBackbone


def run_raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Any:
    """`mole inspect x`, with a reader that raises."""

    def inspect_lora(_: Any) -> None:
        raise error

    monkeypatch.setattr("mole_diffusion.lora.inspect_lora", inspect_lora)
    return CliRunner().invoke(app, ["inspect", "x.safetensors"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MoLEError("wrong\nfile \x1b[31m"), "mole: wrong file \\x1b[31m\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out.png"), "No space left on device: 'out.png'"),
        (MoLEError("x" * 10**6), "…"),
        (
            MemoryError(),
            "mole: there is not enough memory. Take smaller pictures, fewer at a time, or a lower --dtype.",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory. Take smaller pictures"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1]. can't allocate memory: 9 bytes\nframe"),
            "memory: 9 bytes)\n",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Any, said: str) -> None:
    result = run_raising(monkeypatch, error)
    assert result.exit_code == BAD_INPUT
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 2100


def test_an_argument_that_is_no_text_is_said() -> None:
    result = CliRunner().invoke(app, ["generate", "--prompt", "a \udcff cat", "--out", "a.png"])
    assert result.exit_code == BAD_INPUT
    assert result.stderr == "mole: 'a \\udcff cat' is not UTF-8. Write it as text, and give files such names.\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["toybox", "anonymous", "--count", "1", "--out", ""], "--out is empty"),
        (["evaluate", "--images=", "--prompts", "p.txt"], "--images is empty"),
        (["benchmark", "report", "table1", "--out", ""], "--out is empty"),
        (["inspect", "cat.safetensors", "--base", ""], "--base is empty"),
        (["inspect", ""], "an argument is empty"),
        (["convert", "", "--to", "kohya", "--out", "a.safetensors"], "an argument is empty"),
    ],
)
def test_what_is_empty_is_not_the_folder_one_is_in(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only.safetensors").write_bytes(toybox.lora_path("cat").read_bytes())
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == BAD_INPUT
    assert result.stderr == f"mole: {said}. Give it a value, or leave it out.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["only.safetensors"]


@pytest.mark.parametrize("empty", [["--only", ""], ["--negative-prompt", ""], ["--only="]])
def test_nobody_and_nothing_are_written_as_empty(empty: list[str]) -> None:
    result = CliRunner().invoke(app, ["generate", "--prompt", "a cat", "--out", "a.nothing", *empty])
    assert "a picture needs a suffix" in result.stderr


def test_the_traceback_of_what_a_user_can_mend_is_shown_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    def inspect_lora(_: Any) -> None:
        raise MoLEError("wrong file")

    monkeypatch.setattr("mole_diffusion.lora.inspect_lora", inspect_lora)
    result = CliRunner().invoke(app, ["--traceback", "inspect", "x.safetensors"])
    assert result.exit_code == BAD_INPUT
    assert "Traceback (most recent call last)" in result.stderr
    assert "in inspect_lora" in result.stderr
    assert result.stderr.endswith("mole: wrong file\n")


@pytest.mark.parametrize(
    "error", [ValueError("x"), TypeError("x"), KeyError("x"), RuntimeError("x"), OSError("no system call said this")]
)
def test_a_bug_looks_like_one(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    result = run_raising(monkeypatch, error)
    assert result.exit_code == 1
    assert result.exception is error


def test_what_standard_output_cannot_write_is_a_question_mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "Kätzchen.safetensors"
    file.symlink_to(toybox.lora_path("cat"))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict"))
    monkeypatch.setattr("sys.argv", ["mole", "inspect", str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    sys.stdout.seek(0)
    written = "".join(sys.stdout.read().split())
    assert ended.value.code == 0
    assert "K?tzchen.safetensors" in written
    assert "calledby" in written


def damage_json(base: Path) -> None:
    (base / "unet" / "config.json").write_text("{")


def damage_weights(base: Path) -> None:
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def pickle_weights(base: Path) -> None:
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    torch.save({"x": torch.zeros(1)}, file.with_suffix(".bin"))


def no_index(base: Path) -> None:
    (base / "model_index.json").unlink()


@pytest.mark.parametrize("damage", [damage_json, damage_weights, pickle_weights, no_index])
def test_a_base_is_safetensors_and_whole_or_one_error(damage: Callable[[Path], None], tmp_path: Path) -> None:
    base = tmp_path / "base"
    for file in Path(toybox.base_dir()).rglob("*"):
        if file.is_file():
            (base / file.relative_to(toybox.base_dir())).parent.mkdir(parents=True, exist_ok=True)
            (base / file.relative_to(toybox.base_dir())).symlink_to(file)
    replaced = base / "unet" / "diffusion_pytorch_model.safetensors"
    content = replaced.read_bytes()
    replaced.unlink()
    replaced.write_bytes(content)
    config = (base / "unet" / "config.json").read_text()
    (base / "unet" / "config.json").unlink()
    (base / "unet" / "config.json").write_text(config)
    damage(base)
    with pytest.raises(LoadingError, match=r"the base model .*base cannot be loaded: ") as error:
        MoLEStableDiffusionPipeline.from_pretrained(base)
    assert isinstance(error.value, MoLEError)
    assert isinstance(error.value, OSError)


def test_an_encoder_is_safetensors_or_one_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadingError, match=r"the vision model .* cannot be loaded"):
        VisionBackbone.from_pretrained(tmp_path)
