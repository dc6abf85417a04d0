"""The command line: what it writes, and one clear line instead of a traceback."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mole_diffusion import __version__, toybox
from mole_diffusion.cli import main
from mole_diffusion.composition import COMPOSITIONS
from mole_diffusion.pipelines import MoLEStableDiffusionPipeline
from tests import ROOT
from tests.command import PROMPT, drawing, mole, picture
from tests.composing import NAMES

COMMANDS = [
    ["demo"],
    ["generate"],
    ["inspect"],
    ["methods"],
    ["train-lora"],
    ["train-gates"],
    ["balance-study"],
    ["evaluate"],
    ["benchmark", "run"],
    ["benchmark", "report"],
    ["toybox", "build"],
    ["toybox", "show"],
    ["toybox", "anonymous"],
    ["toybox", "measure"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(command: list[str]) -> None:
    done = mole(*command, "--help")
    assert done.exit_code == 0
    assert f"    mole {' '.join(command)}" in done.stdout


def test_methods_lists_every_method_with_its_cost() -> None:
    done = mole("methods")
    assert done.exit_code == 0
    rows = {cells[1].strip(): cells for line in done.stdout.splitlines() if len(cells := line.split("│")) > 4}
    assert {*COMPOSITIONS, "soup"} <= set(rows)
    assert [rows[name][2].strip() for name in ("linear", "composite", "soup")] == ["1, 1, 1", "1, 2, 3", "1, 1, 1"]
    needed = [rows[name][3].strip() for name in ("linear", "masks", "mole", "soup")]
    assert needed == ["–", "trigger words", "trained gates", "trained gates"]


@pytest.mark.parametrize("columns", [80, 56])
def test_methods_cuts_nothing_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done = mole("methods")
    assert "…" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= columns
    sources = "".join(cells[4] for line in done.stdout.splitlines() if len(cells := line.split("│")) > 5)
    for name, method in COMPOSITIONS.items():
        assert "".join(method.source.split()) in "".join(sources.split()), name


@pytest.mark.parametrize("columns", [80, 40])
def test_inspect_cuts_nothing_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    file = toybox.lora_path("cat")
    lines = mole("inspect", file).stdout.splitlines()
    assert "…" not in "".join(lines)
    assert max(map(len, lines)) <= columns
    hashed = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    assert hashed in "".join(line.partition("│")[2].strip() for line in lines)
    if columns == 80:
        assert any(hashed in line for line in lines)


def test_version() -> None:
    assert mole("--version").stdout == f"mole {__version__}\n"


def test_a_shell_completes_commands() -> None:
    environment = {**os.environ, "_MOLE_COMPLETE": "complete_bash", "COMP_WORDS": "mole gen", "COMP_CWORD": "1"}
    done = run_script(environment=environment)
    assert done.stdout.split() == ["generate"]


def test_generate_draws_what_the_pipeline_draws(world: Path, tmp_path: Path) -> None:
    done = mole(
        *drawing(world, tmp_path / "new" / "it.png", "--gates", world / "gates", "--only", "cat,mug", "--seed", 5)
    )
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "new" / "it.png") in done.stdout
    pipe = MoLEStableDiffusionPipeline.from_pretrained(world / "base")
    pipe.load_loras({name: world / f"{name}.safetensors" for name in NAMES})
    pipe.load_gates(world / "gates")
    expected = pipe(PROMPT, loras=["cat", "mug"], num_inference_steps=2, generator=torch.manual_seed(5)).images[0]
    assert picture(tmp_path / "new" / "it.png").tobytes() == expected.tobytes()


def test_generate_with_a_plain_method_and_masked_loras(world: Path, tmp_path: Path) -> None:
    choices: list[list[str]] = [[], ["--composition", "linear"], ["--only", ""]]
    pictures = set()
    for choice in choices:
        done = mole(*drawing(world, tmp_path / "it.png", *choice))
        assert done.exit_code == 0, done.output
        pictures.add(picture(tmp_path / "it.png").tobytes())
    assert len(pictures) == len(choices)


def test_inspect(world: Path) -> None:
    done = mole("inspect", world / "dog.safetensors")
    assert done.exit_code == 0, done.output
    for word in ("diffusers", "in the denoiser", "in text_encoder", "6 (", "SHA-256"):
        assert word in done.stdout


def test_interrupting_exits_130(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> None:
        # Not by raising the signal: a shell's background job, as CI may be, ignores it.
        raise KeyboardInterrupt

    monkeypatch.setattr("mole_diffusion.lora.inspect_lora", interrupt)
    done = mole("inspect", world / "cat.safetensors")
    assert done.exit_code == 130
    assert "mole: interrupted" in done.stderr


def test_a_bug_is_not_taken_for_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise AttributeError("ours")

    monkeypatch.setattr("mole_diffusion.lora.inspect_lora", fail)
    assert isinstance(mole("inspect", "x").exception, AttributeError)


def run_script(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    start = "import sys; from mole_diffusion.cli import main; main()"
    command = [sys.executable, "-c", start, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


def test_as_a_process_of_its_own() -> None:
    done = run_script("inspect", "no/such.safetensors")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("mole: no/such.safetensors: no such file")


def test_a_terminal_that_has_not_every_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(sys, "argv", ["mole", "methods"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    sys.stdout.flush()
    assert b"composite" in written.getvalue()
    assert b"?" in written.getvalue()


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from mole_diffusion.cli import app; print([m for m in ('torch', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
