"""Gates trained for something else than CLIP's guidance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mole_diffusion.errors import MoLEError
from mole_diffusion.training import GateTrainingConfig, train_gates
from mole_diffusion.training.engine.optimizer import learning_rate_factor
from mole_diffusion.training.gates.objective import Drawn
from tests.gate_training import PROMPTS, config, mole_pipeline

SETTINGS = config(steps=8, learning_rate=0.05, balance="off", rollout_steps=1, guidance_scale=1.0, checkpoint_every=4)


class QuietPredictions:
    """Wants predictions to be small; it reads no text and sees no picture."""

    def __init__(self, name: str = "quiet") -> None:
        self.name = name

    def loss(self, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        loudness = drawn.prediction.square().mean()
        assert [PROMPTS[index] for index in drawn.prompts]
        return loudness, {"loudness": loudness}

    def made_of(self) -> dict[str, list[str]]:
        return {"the objective": [self.name]}


def train(
    pipe: Any, objective: QuietPredictions, settings: GateTrainingConfig = SETTINGS, **options: Any
) -> list[float]:
    numbers: list[float] = []
    train_gates(
        pipe,
        settings,
        prompts=PROMPTS,
        objective=objective,
        progress=False,
        on_step_end=lambda step, losses: numbers.append(losses["loudness"]),
        **options,
    )
    return numbers


def test_gates_learn_what_an_objective_of_ones_own_asks_for_and_no_picture_is_decoded(tmp_path: Path) -> None:
    pipe = mole_pipeline()
    decoded: list[object] = []
    handle = pipe.vae.decoder.register_forward_hook(lambda *args: decoded.append(args))
    loudness = train(pipe, QuietPredictions(), work=tmp_path)
    handle.remove()
    assert len(loudness) == 8
    # Steps differ in noise and in how much of it there is: compared with the same steps of gates that stand still.
    still = train(mole_pipeline(), QuietPredictions(), replace(SETTINGS, learning_rate=1e-12))
    assert loudness[0] == still[0]
    assert sum(loudness[1:]) < sum(still[1:])
    assert decoded == []
    with pytest.raises(MoLEError, match="is of another training: not the same: the objective"):
        train(mole_pipeline(), QuietPredictions("other"), work=tmp_path)


def test_clip_or_an_objective_and_not_both() -> None:
    pipe = mole_pipeline()
    clip: Any = torch.nn.Identity()
    for given in ({}, {"clip": clip, "objective": QuietPredictions()}):
        with pytest.raises(MoLEError, match="Give either `clip`"):
            train_gates(pipe, SETTINGS, prompts=PROMPTS, **given)


@pytest.mark.parametrize("ours", ["cosine", "constant"])
def test_the_learning_rate_is_that_of_diffusers_counted_from_one(ours: Any) -> None:
    """diffusers' own first step of a warm-up has a rate of zero, and is lost; ours needs no state to be resumed."""
    from diffusers.optimization import get_scheduler

    for steps, warmup in ((20, 0), (20, 5)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        name = {"constant": "constant_with_warmup"}.get(ours, ours)
        theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup + 1, num_training_steps=steps + 1)
        for step in range(steps):
            optimizer.step()
            theirs.step()
            assert learning_rate_factor(step, steps, warmup, ours) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
