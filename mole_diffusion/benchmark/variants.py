"""The trainings that a study of the balance loss compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mole_diffusion.errors import MoLEError
from mole_diffusion.training.gates.config import GateTrainingConfig

TEMPERATURES = (2.0, 5.0, 10.0)


def variants(config: GateTrainingConfig, temperatures: Sequence[float]) -> dict[str, GateTrainingConfig]:
    """By name, the trainings that `balance_study` compares; arguments as there.

    Raises:
        MoLEError: A temperature is not positive or comes twice, or gates of this config have no balance to keep.
    """
    if config.balance == "off":
        config = dataclasses.replace(config, balance="uniform")
    without = dataclasses.replace(config, balance="off")
    raised = {
        f"temperature {temperature:g}": dataclasses.replace(
            without, gates=dataclasses.replace(config.gates, temperature=temperature, learn_temperature=False)
        )
        for temperature in temperatures
    }
    if len(raised) < len(temperatures):
        raise MoLEError(f"each temperature is a training of its own, and one comes twice in {list(temperatures)}.")
    return {"balance loss": config, "no balance loss": without, **raised}
