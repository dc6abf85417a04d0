"""Settings of a gate training: what they may be, and presets with changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mole_diffusion.gating import GateConfig
from mole_diffusion.training import PRESETS, GateTrainingConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"balance_weight": -1.0}, "`balance_weight` must be 0 or more, got -1.0.*paper takes 0.5"),
        ({"local_weight": float("nan")}, "`local_weight` must be 0 or more, got nan. 0 switches the term off"),
        ({"global_weight": 0.0, "identity_weight": 0.0}, "are all 0: nothing says what the pictures should show"),
        ({"rollout_steps_max": "12"}, "`rollout_steps_max` must be of type int or None, got '12'"),
        ({"resolution": 512.0}, r"`resolution` must be of type int or None, got 512\.0"),
        ({"resolution": True}, "`resolution` must be of type int or None, got True"),
        ({"steps": 3.5}, "`steps` must be of type int, such as 40, got 3.5"),
        ({"steps": float("nan")}, "`steps` must be of type int, such as 40, got nan"),
        ({"batch_size": None}, "`batch_size` must be of type int, such as 4, got None"),
        ({"learning_rate": None}, "`learning_rate` must be of type float, such as 0.01, got None"),
        ({"learning_rate": [1e-3]}, "`learning_rate` must be of type float"),
        ({"eta": True}, "`eta` must be of type float, such as 0.0, got True"),
        ({"learning_rate": 10**400}, "`learning_rate` must be of type float"),
        ({"seed": -1}, "`seed` must be 0 or more, and less than .*, got -1"),
        ({"seed": 2**63}, "`seed` must be 0 or more, and less than 2..63, got 9223372036854775808"),
        ({"balance": "even"}, r"`balance` must be one of \['uniform', 'floor', 'off'\], got 'even'"),
        ({"loss_shape": "square"}, "`loss_shape` must be one of"),
        ({"picture": "blurred"}, "`picture` must be one of"),
        ({"learning_rate_schedule": "linear"}, "`learning_rate_schedule` must be one of"),
        ({"rollout_steps": 0}, "`rollout_steps` must be at least 1, got 0"),
        ({"gradient_accumulation": 0}, "`gradient_accumulation` must be at least 1"),
        ({"identity_crops": 0}, "`identity_crops` must be at least 1"),
        ({"reference_pictures": 0}, "`reference_pictures` must be at least 1"),
        ({"gradient_steps": -1}, r"`gradient_steps` must be 0 \(all\) or more, got -1"),
        ({"gradient_steps": 9}, r"`gradient_steps` \(9\) must be at most `rollout_steps` \(8\)"),
        ({"rollout_steps_max": 7}, r"`rollout_steps_max` \(7\) must be at least `rollout_steps` \(8\)"),
        ({"balance_floor": 1.0}, "`balance_floor` must lie between 0 and 1, got 1.0"),
        ({"eta": 1.5}, r"`eta` must lie between 0 \(DDIM\) and 1 \(DDPM\), got 1.5"),
        ({"guidance_scale": 0.5}, r"`guidance_scale` must be at least 1 \(no guidance\), got 0.5"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"steps": 5}, r"`warmup_steps` \(10\) must be fewer than `steps` \(5\)"),
        ({"batch_size": 3, "gradient_accumulation": 2}, r"`batch_size` \(3\) must be a multiple of"),
        ({"mixed_precision": "fp8"}, "`mixed_precision` must be"),
    ],
)
def test_settings_that_cannot_be_say_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateTrainingConfig(**changes)
    with pytest.raises(ValueError, match=message):
        GateTrainingConfig.from_dict(changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepps": 3}, r"unknown settings \['stepps'\] in GateTrainingConfig; known are balance, "),
        ({1: 2, "stepps": 3, None: 4}, r"unknown settings \[1, 'stepps', None\] in GateTrainingConfig"),
        ({"gates": {"scop": "layer"}}, r"unknown settings \['scop'\] in GateConfig; known are experts, "),
        ({"gates": "layer"}, "`gates` must be a dictionary .* got 'layer'"),
        ({"steps": "many"}, "`steps` must be of type int, such as 40, got 'many'"),
        ({"steps": True}, "`steps` must be of type int"),
        ({"learning_rate": "fast"}, "`learning_rate` must be of type float, such as 0.01, got 'fast'"),
        ({"gradient_checkpointing": 1}, "`gradient_checkpointing` must be of type bool, such as False, got 1"),
        ({"gates": {"temperature": "warm"}}, "`temperature` must be of type float"),
        ({"gates": {"temperature": 1e-40}}, "`temperature` must lie between 2e-09 and 5e\\+08, got 1e-40"),
        ({"preset": "best"}, "there is no preset 'best'; there are default, real, masks, paper, official"),
    ],
)
def test_dictionaries_that_cannot_be_say_why(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateTrainingConfig.from_dict(values)


def test_a_preset_with_changes() -> None:
    changes = {"preset": "paper", "steps": 7, "learning_rate": "1e-3", "gates": {"scope": "layer"}}
    config = GateTrainingConfig.from_dict(changes, preset="official")
    paper = GateTrainingConfig.from_dict({}, "paper")
    gates = GateConfig(scope="layer", token_axis="flatten")
    assert config == dataclasses.replace(paper, steps=7, learning_rate=1e-3, gates=gates)
    assert GateTrainingConfig.from_dict({}) == GateTrainingConfig()
    changed = GateTrainingConfig.from_dict({"gates": {"token_axis": 4}})
    assert changed.gates == dataclasses.replace(GateTrainingConfig().gates, token_axis=4)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_survives_a_dictionary(preset: str) -> None:
    config = GateTrainingConfig.from_dict({}, preset)
    assert GateTrainingConfig.from_dict(dataclasses.asdict(config)) == config


def test_the_papers_own_numbers() -> None:
    paper = GateTrainingConfig.from_dict({}, "paper")
    assert (paper.steps, paper.batch_size, paper.learning_rate, paper.rollout_steps) == (400, 2, 1e-5, 50)
    assert (paper.global_weight, paper.local_weight, paper.identity_weight) == (1.0, 1.0, 0.0)
    assert (paper.balance, paper.balance_weight, paper.gates.learn_temperature) == ("uniform", 0.5, True)
    assert paper.gates == GateConfig(token_axis="flatten", scope="block", input="experts")
