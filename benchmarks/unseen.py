"""Methods on LoRAs that nothing was chosen on: `python benchmarks/unseen.py outputs/anonymous --out outputs/unseen`.

The LoRAs are anonymous subjects of the toybox, made by `mole toybox anonymous --out outputs/anonymous`. Compositions,
orders and grounds are drawn from a seed. What is done is kept in the folder, so a run may be stopped and started again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from drawn import Row, load, looked_at, place, table, toybox_pipeline

from mole_diffusion import toybox, train_gates
from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.composition import Composition, Masks, Normalized, NormRouter
from mole_diffusion.metrics import concept_presence
from mole_diffusion.training import GateTrainingConfig

TRAIN, MEASURE = ("grass", "sand", "snow", "water"), ("slate", "brick")
METHODS: dict[str, Composition | None] = {
    "normalized": Normalized(),
    "norm_router": NormRouter(),
    "masks": Masks(),
    "masks online": Masks(online=True, start=0.08, stop=0.16),
    "gates": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subjects", type=Path, help="folder that `mole toybox anonymous` made")
    parser.add_argument("--out", type=Path, default=Path("outputs/unseen"))
    parser.add_argument("--compositions", type=int, default=12)
    parser.add_argument("--loras", type=int, default=3, help="in a composition")
    parser.add_argument("--seeds", type=int, default=5, help="pictures for each ground")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    given = parser.parse_args()

    found = toybox.anonymous_subjects(given.subjects)
    files = {name: file for name, (_, file) in found.items()}
    rng = np.random.default_rng(0)
    chosen = [[str(n) for n in rng.permutation(sorted(found))[: given.loras]] for _ in range(given.compositions)]
    pipe, oracle, clip = toybox_pipeline(), toybox.Oracle(), DifferentiableCLIP(toybox.clip_dir())
    rows: dict[str, list[Row]] = {label: [] for label in given.methods}
    for number, names in enumerate(chosen):
        subjects = [found[name][0] for name in names]
        load(pipe, subjects, files)
        for label in given.methods:
            pipe.unload_gates()
            method = METHODS[label]
            todo = [place(given.out, str(number), *names, label, ground) for ground in MEASURE]
            if method is None and not all(file.exists() for file in todo):
                _train(pipe, subjects, clip, given.out / "gates" / "+".join(names))
            pipe.set_composition(method if method is not None or pipe.gates is None else "mole")
            for ground, file in zip(MEASURE, todo, strict=True):
                prompt = toybox.subject_prompt(subjects, ground)
                rows[label] += looked_at(
                    pipe, oracle, file, prompt, given.seeds, lambda _, seen, own=subjects: concept_presence(seen, own)
                )
    table(rows, "presence rate", "gates" if "gates" in given.methods else given.methods[0])


def _train(pipe: Any, subjects: list[Any], clip: DifferentiableCLIP, out: Path) -> None:
    train_gates(
        pipe,
        GateTrainingConfig(guidance_scale=2.0),
        prompts=[toybox.subject_prompt(subjects, ground) for ground in TRAIN],
        concepts={item.name: toybox.concept(item) for item in subjects},
        clip=clip,
        out=out,
        pictures=False,
    )


if __name__ == "__main__":
    main()
