"""What a gate training leaves, and the study that compares several."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mole_diffusion.benchmark import balance_study
from mole_diffusion.benchmark.study import variants
from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.gating import GateConfig, GateTable
from mole_diffusion.training.engine.history import History, gate_entropy
from tests import reference
from tests.gate_training import CONCEPTS, PROMPTS, config, mole_pipeline, train

pytestmark = pytest.mark.usefixtures("few_steps")
LEFT = (
    "README.md config.json curves.png diffusion_pytorch_model.safetensors gates.png samples.png training.json".split()
)


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_what_a_training_leaves(clip: DifferentiableCLIP, tmp_path: Path) -> None:
    pipe = mole_pipeline()
    settings = config(steps=3, learning_rate=0.5)
    gates = train(pipe, settings, clip, concepts=CONCEPTS, out=tmp_path / "gates")
    assert sorted(file.name for file in (tmp_path / "gates").iterdir()) == LEFT
    for picture in ("curves.png", "gates.png", "samples.png"):
        assert min(size(tmp_path / "gates" / picture)) > 200
    record = json.loads((tmp_path / "gates" / "training.json").read_text())
    assert record["prompts"] == {PROMPTS[0]: "a cat on grass", PROMPTS[1]: "a red dog in the sand"}
    assert record["concepts"]["lora1"] == {
        "token": "<v2>",
        "class_name": "dog",
        "description": "red dog",
        "references": 0,
    }
    card = (tmp_path / "gates" / "README.md").read_text()
    for words in (
        "# Gates for lora0 + lora1",
        pipe.experts.loras[0].fingerprint,
        'token "<v1>"',
        PROMPTS[1],
        "seed 0",
        "| global |",
        "| entropy |",
    ):
        assert words in card, words
    assert "weight/" not in card
    # Drawing the pictures of before has left the trained gates where they were.
    other = mole_pipeline()
    other.load_gates(tmp_path / "gates")
    state = gates.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in other.gates.state_dict().items())
    assert any(value.abs().max() > 0.1 for value in state.values())


def table(*rows: list[float]) -> GateTable:
    return GateTable(("x", "y"), ("a", "b"), torch.tensor(rows))


def test_history_keeps_early_and_late_gates_over_a_checkpoint() -> None:
    history = History(20)
    for step in range(1, 21):
        if step == 10:
            state = json.loads(json.dumps(history.state_dict()))
            history = History(20)
            history.load_state_dict(state)
        history.add(step, {"loss": float(step)}, table([step / 20, 0.0], [0.5, 0.5]))
    tables = history.tables()
    torch.testing.assert_close(tables["early"].values[0, 0], torch.tensor((1 + 2) / 40).double())
    torch.testing.assert_close(tables["late"].values[0, 0], torch.tensor((19 + 20) / 40).double())
    assert tables["late"].loras == ("a", "b")
    assert (history.first_mean("loss"), history.last_mean("loss")) == (1.5, 19.5)


def test_entropy_is_a_mean_over_contested_places() -> None:
    shares = torch.tensor([[[0.7, 0.3], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    present = torch.tensor([[True, True], [True, False]])
    expected = reference.entropy([0.7, 0.3]) / 2
    assert gate_entropy(shares, present).item() == pytest.approx(expected)
    assert gate_entropy(shares, present & torch.tensor([True, False])).item() == 0


def test_the_study_compares_balance_and_temperatures(clip: DifferentiableCLIP, tmp_path: Path) -> None:
    options: dict[str, Any] = {"prompts": PROMPTS, "clip": clip, "progress": False, "out": tmp_path / "study"}
    settings = config(steps=2, rollout_steps=1, guidance_scale=1.0, gates=GateConfig(input="none", scope="network"))
    rows = balance_study(mole_pipeline(), settings, temperatures=[3.0], **options)
    assert [row["variant"] for row in rows] == ["balance loss", "no balance loss", "temperature 3"]
    assert [row["balance"] for row in rows] == ["uniform", "off", "off"]
    assert rows[2]["temperature"] == pytest.approx(3.0)
    assert all(row["weight/lora0"] + row["weight/lora1"] == pytest.approx(1, abs=1e-5) for row in rows)
    assert json.loads((tmp_path / "study" / "study.json").read_text()) == rows
    with (tmp_path / "study" / "study.csv").open(newline="") as file:
        assert [row["variant"] for row in csv.DictReader(file)] == [row["variant"] for row in rows]
    assert len((tmp_path / "study" / "study.md").read_text().splitlines()) == 5
    for picture in ("entropy.png", "weights.png"):
        assert min(size(tmp_path / "study" / picture)) > 150
    assert (tmp_path / "study" / "temperature-3" / "config.json").is_file()
    without = dataclasses.replace(settings, balance="off")  # of a training that has none, the paper's is studied
    assert variants(without, [3.0]) == variants(settings, [3.0])


@pytest.mark.parametrize(
    ("temperatures", "changes", "message"),
    [
        ([2.0, 2.0000001], {}, "one comes twice in"),
        ([2.0, 0.0], {}, "`temperature` must be positive and finite, got 0.0"),
        ([float("nan")], {}, "`temperature` must be positive and finite, got nan"),
        ([2.0], {"gates": GateConfig(input="hidden", token_axis="token", residual=True)}, "no balance to keep"),
    ],
)
def test_a_study_that_cannot_be_says_so_before_it_trains(
    temperatures: list[float], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        variants(dataclasses.replace(config(), **changes), temperatures)
