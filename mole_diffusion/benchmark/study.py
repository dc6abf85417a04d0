"""Does the balance loss earn its place? Gates with it, without it, and with a raised temperature instead."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mole_diffusion.benchmark.variants import TEMPERATURES, variants
from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.files import atomic_path, write_json
from mole_diffusion.sheets import curves, gate_heat_map
from mole_diffusion.tables import markdown_table, number, write_csv
from mole_diffusion.training.gates.concepts import Concept
from mole_diffusion.training.gates.config import GateTrainingConfig
from mole_diffusion.training.gates.report import TRAINING_FILE
from mole_diffusion.training.gates.train import train_gates


def balance_study(
    pipe: Any,
    config: GateTrainingConfig,
    *,
    prompts: Sequence[str],
    clip: DifferentiableCLIP,
    concepts: Mapping[str, Concept] | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
    out: str | os.PathLike[str],
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Trains one set of gates in several ways, and compares what they do.

    After Figure 5 (entropy of the gates and their mean weights, with and without the balance loss) and Table 7 (the
    balance loss against a raised temperature; its values are not published) of "Mixture of LoRA Experts",
    https://openreview.net/forum?id=uWvKBCYh4S.

    Args:
        pipe: A MoLE pipeline with the LoRAs loaded.
        config: The settings of every training, but for balance and temperature. Where it has no balance loss, the
            paper's is taken.
        prompts: The prompts to train on, as in `train_gates`.
        clip: The CLIP that guides.
        concepts: What each LoRA stands for, as in `train_gates`.
        temperatures: Raised ones, fixed in training, each without the balance loss.
        out: Folder for study.json, study.csv, study.md, entropy.png, weights.png and, in a folder each, the gates. Run
            again, what is finished is kept and an interrupted training goes on.
        progress: Show a bar for each training.

    Returns:
        One row per training, as in study.json: variant, balance, temperature, the entropy in the first and in the last
        tenth of training, the mean of every loss term and the mean weight of every LoRA in the last tenth.

    Raises:
        MoLEError: A temperature is not positive or comes twice, or as in `train_gates`.
    """
    folder = Path(out)
    rows: list[dict[str, Any]] = []
    entropies: dict[str, list[float]] = {}
    for variant, changed in variants(config, temperatures).items():
        place = folder / variant.replace(" ", "-")
        train_gates(
            pipe,
            changed,
            prompts=prompts,
            clip=clip,
            concepts=concepts,
            out=place,
            work=place.with_name(f"{place.name}.work"),
            progress=progress,
        )
        numbers = json.loads((place / TRAINING_FILE).read_text(encoding="utf-8"))["numbers"]
        rows.append(_row(variant, changed, numbers))
        entropies[variant] = numbers["entropy"]
    _write(folder, rows, entropies)
    return rows


def _row(variant: str, config: GateTrainingConfig, numbers: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    tenth = max(1, config.steps // 10)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    last = {name: mean(values[-tenth:]) for name, values in numbers.items()}
    terms: dict[str, Any] = {name: last[name] for name in ("global", "local", "identity") if name in last}
    weights = {name: value for name, value in last.items() if name.startswith("weight/")}
    return {
        "variant": variant,
        "balance": config.balance,
        "temperature": last["temperature"],
        "entropy first": mean(numbers["entropy"][:tenth]),
        "entropy last": last["entropy"],
        **terms,
        **weights,
    }


def _write(folder: Path, rows: list[dict[str, Any]], entropies: Mapping[str, Sequence[float]]) -> None:
    write_json(folder / "study.json", rows)
    columns = list(rows[0])
    write_csv(folder / "study.csv", rows)
    cells = [[number(v, 4) if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    with atomic_path(folder / "study.md") as temporary:
        temporary.write_text(markdown_table(columns, cells), encoding="utf-8")
    curves({"gate entropy (nats)": entropies}, folder / "entropy.png", title="gate entropy while training")
    loras = [column for column in columns if column.startswith("weight/")]
    weights = torch.tensor([[row[lora] for lora in loras] for row in rows])
    names = [lora.removeprefix("weight/") for lora in loras]
    gate_heat_map(weights, list(entropies), names, folder / "weights.png", title="mean weight, last tenth")
