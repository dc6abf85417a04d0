"""Gate trainings that are killed, and those of several processes; real ones, with real signals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import forked
from tests.fork_server import ForkServer
from tests.tiny.clip import write_clip

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "clip")


def test_a_killed_training_goes_on_as_if_nothing_had_been(
    tmp_path: Path, clip_folder: Path, fork_server: ForkServer
) -> None:
    """Killed while it draws references, writes checkpoints and computes: the same bits in the end."""
    assert fork_server.run(forked.killed, tmp_path, clip_folder) == [0, -9, -9, -9, -9, -9, 0]
    assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (tmp_path / "peaceful" / WEIGHTS).read_bytes()
    records = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("killed", "peaceful")]
    assert records[0] == records[1]
    assert len(records[0]["numbers"]["loss"]) == 5
    work = sorted(path.name for path in (tmp_path / "killed.work").iterdir())
    assert work == ["references", "state.json", "step-0000005.safetensors"]  # nothing half-written is left


def test_a_killed_training_of_a_lora_goes_on_as_if_nothing_had_been(tmp_path: Path, fork_server: ForkServer) -> None:
    assert fork_server.run(forked.killed_lora, tmp_path) == [0, -9, -9, -9, -9, 0]
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "peaceful.safetensors").read_bytes()
    for name in ("killed", "peaceful"):  # nothing half-written is left
        assert sorted(p.name for p in (tmp_path / f"{name}.work").iterdir()) == [
            "state.json",
            "step-0000002.safetensors",
        ]
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".work"}


def test_two_processes_with_half_the_batch_each_are_one_with_the_whole(
    tmp_path: Path, clip_folder: Path, fork_server: ForkServer
) -> None:
    """But for the order of float32 sums, which Adam magnifies: a step moves a parameter by up to 0.05."""
    assert fork_server.run(forked.together, tmp_path, clip_folder) == [0, 0, 0]
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    assert max(value.abs().max() for value in one.values()) > 0.05
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=5e-4, rtol=0)
    numbers = [json.loads((tmp_path / name / "training.json").read_text())["numbers"] for name in ("one", "two")]
    assert set(numbers[0]) == set(numbers[1])
    for name, values in numbers[0].items():
        torch.testing.assert_close(torch.tensor(numbers[1][name]), torch.tensor(values), atol=2e-3, rtol=1e-3)
