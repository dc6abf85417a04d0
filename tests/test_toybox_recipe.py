"""The recipe, end to end and very short: it runs, resumes exactly, and leaves what stock libraries open."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mole_diffusion import toybox
from mole_diffusion.toybox import recipe
from mole_diffusion.toybox.recipe.base import layout
from mole_diffusion.toybox.recipe.clip import wrong_scene
from mole_diffusion.toybox.recipe.loop import AveragedWeights, run_stage, step_rng, trapezoid
from mole_diffusion.toybox.world import full_caption, random_scene


def _train(work_dir: Path, num_steps: int, stop: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    average = AveragedWeights(module, 0.9)

    def step(k: int) -> dict[str, torch.Tensor]:
        if stop and k == num_steps // 2:
            raise KeyboardInterrupt
        x = torch.from_numpy(step_rng(0, "test", k).standard_normal((8, 4), np.float32))
        return {"loss": module(x).square().mean()}

    settings = {"num_steps": num_steps, "schedule": trapezoid, "work_dir": work_dir, "seed": seed}
    run_stage("test", module, optimizer, step, average=average, **settings)
    assert torch.equal(module.weight, average.tensors["average.weight"])
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_an_interrupted_stage_goes_on_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = _train(tmp_path / "straight", 20)
    monkeypatch.setattr("mole_diffusion.toybox.recipe.loop._SAVE_EVERY_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "broken", 20, stop=True)
    resumed = _train(tmp_path / "broken", 20)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    with pytest.raises(ValueError, match="is of another training"):
        _train(tmp_path / "broken", 20, seed=1)


def test_a_loss_that_is_no_number_stops_with_the_step(tmp_path: Path) -> None:
    module = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    average = AveragedWeights(module, 0.9)

    def step(k: int) -> dict[str, torch.Tensor]:
        return {"loss": module.weight.sum() * (float("nan") if k == 3 else 1.0)}

    settings = {"num_steps": 5, "schedule": trapezoid, "work_dir": tmp_path, "seed": 0}
    with pytest.raises(ValueError, match="stopped at step 4: loss = nan"):
        run_stage("test", module, optimizer, step, average=average, **settings)


def test_the_layout_names_the_class_in_every_cell_of_a_box() -> None:
    rng = np.random.default_rng(0)
    scene = random_scene(rng, 2)
    cells = layout(scene)
    for item in scene.objects:
        left, top, right, bottom = (edge / 8 for edge in item.box)
        middle = cells[int((top + bottom) / 2), int((left + right) / 2)]
        from mole_diffusion.toybox.shapes import CLASSES

        assert CLASSES[middle - 1] == item.class_name
    assert (cells == 0).any()


def test_a_hard_negative_says_something_else() -> None:
    rng = np.random.default_rng(0)
    same = 0
    for _ in range(100):
        scene = random_scene(rng)
        same += full_caption(scene) == full_caption(wrong_scene(scene, rng))
    assert same <= 3  # a redrawn look may come out as it was


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_whole_recipe_runs_and_a_second_run_finds_all_done(tmp_path: Path) -> None:
    effort = recipe.Effort(
        vae_steps=2,
        vae_batch=2,
        base_steps=2,
        base_batch=2,
        num_scenes=8,
        clip_steps=2,
        clip_batch=2,
        lora_steps=2,
        gate_steps=2,
        pictures=1,
    )
    assets = recipe.build(tmp_path, effort=effort)
    report = json.loads((assets / "report.json").read_text())
    assert set(report["base"]) == {"1", "2", "3", "4", "5", "6"}
    assert sorted(report["subjects"]) == sorted(toybox.subjects())
    files = {path: path.read_bytes() for path in assets.rglob("*.safetensors")}
    assert len(files) == 3 + 1 + len(toybox.subjects()) + 2 + len(recipe.gates.SETS)
    recipe.build(tmp_path, effort=effort)
    assert {path: path.read_bytes() for path in assets.rglob("*.safetensors")} == files
