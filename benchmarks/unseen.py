"""Methods on LoRAs that nothing was chosen on: `python benchmarks/unseen.py outputs/anonymous --out outputs/unseen`.

The LoRAs are anonymous subjects of the toybox, made by `mole toybox anonymous --out outputs/anonymous`. Compositions,
orders and grounds are drawn from a seed. What is done is kept in the folder, so a run may be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mole_diffusion import MoLEStableDiffusionPipeline, toybox, train_gates
from mole_diffusion.benchmark.stats import paired_bootstrap
from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.composition import Composition, Masks, Normalized, NormRouter
from mole_diffusion.files import write_json
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
    rng = np.random.default_rng(0)
    chosen = [[str(n) for n in rng.permutation(sorted(found))[: given.loras]] for _ in range(given.compositions)]
    pipe = MoLEStableDiffusionPipeline.from_pretrained(toybox.base_dir())
    pipe.set_progress_bar_config(disable=True)
    oracle, clip = toybox.Oracle(), DifferentiableCLIP(toybox.clip_dir())
    for names in chosen:
        subjects = [found[name][0] for name in names]
        pipe.unload_loras()
        pipe.load_loras(
            {name: found[name][1] for name in names}, triggers={item.name: item.trigger for item in subjects}
        )
        for label in given.methods:
            file = given.out / f"{'+'.join(names)}.{label}.json"
            if file.exists():
                continue
            pipe.unload_gates()
            method = METHODS[label]
            if method is None:
                train_gates(
                    pipe,
                    GateTrainingConfig(guidance_scale=3.0),
                    prompts=[toybox.subject_prompt(subjects, ground) for ground in TRAIN],
                    concepts={item.name: toybox.concept(item) for item in subjects},
                    clip=clip,
                    out=given.out / "gates" / "+".join(names),
                    pictures=False,
                )
            pipe.set_composition("mole" if method is None else method)
            rows: list[dict[str, float]] = []
            for ground in MEASURE:
                pictures = pipe(
                    [toybox.subject_prompt(subjects, ground)] * given.seeds,
                    num_inference_steps=25,
                    guidance_scale=3.0,
                    generator=[torch.Generator().manual_seed(seed) for seed in range(given.seeds)],
                ).images
                rows += [concept_presence(detections, subjects) for detections in oracle.detect(pictures)]
            write_json(file, rows)
            print(
                f"{'+'.join(names)}, {label}: presence {np.mean([row['presence rate'] for row in rows]):.2f}",
                flush=True,
            )
    table(given.out, ["+".join(names) for names in chosen], given.methods)


def table(out: Path, compositions: list[str], methods: list[str]) -> None:
    """Means over all pictures, and differences of presence to gates (or the first method) with 95 % intervals."""
    rows: dict[str, list[dict[str, Any]]] = {
        label: [row for name in compositions for row in json.loads((out / f"{name}.{label}.json").read_text())]
        for label in methods
    }
    reference = "gates" if "gates" in methods else methods[0]
    keys = ("presence rate", "all-present rate", "omission rate", "confusion rate")
    print("method            " + "".join(f"{key:>18s}" for key in keys) + f"   presence over {reference}")
    for label, measured in rows.items():
        means = "".join(f"{np.mean([row[key] for row in measured]):18.3f}" for key in keys)
        own, other = ({k: row["presence rate"] for k, row in enumerate(side)} for side in (measured, rows[reference]))
        difference, low, high = paired_bootstrap(own, other)
        print(f"{label:18s}{means}   {difference:+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main()
