"""Two things of one class with different looks: `python benchmarks/same_class.py outputs/anonymous`.

A subject of the toybox beside an anonymous one of its class, made by `mole toybox anonymous --out outputs/anonymous`.
The base never saw two things of a class in a picture. Masks are found, or given: one half of the picture each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drawn import Row, load, looked_at, named, place, table, toybox_pipeline

from mole_diffusion import toybox
from mole_diffusion.toybox.oracle import Detection
from mole_diffusion.toybox.subjects import Subject

METHODS = ("normalized", "norm_router", "masks", "regions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subjects", type=Path, help="folder that `mole toybox anonymous` made")
    parser.add_argument("--out", type=Path, default=Path("outputs/same_class"))
    parser.add_argument("--seeds", type=int, default=10, help="pictures for each pair")
    given = parser.parse_args()

    found = toybox.anonymous_subjects(given.subjects)
    files = {name: file for name, (_, file) in found.items()}
    pipe, oracle = toybox_pipeline(), toybox.Oracle()
    rows: dict[str, list[Row]] = {label: [] for label in METHODS}
    for item, _ in found.values():
        if item.class_name not in toybox.subjects():
            continue
        pair = [*named([item.class_name]), item]
        load(pipe, pair, files)
        halves = {pair[0].name: (0, 0, 0.5, 1), pair[1].name: (0.5, 0, 1, 1)}
        for label in METHODS:
            pipe.set_composition("masks" if label == "regions" else label)
            options: dict[str, Any] = {"regions": halves} if label == "regions" else {}
            rows[label] += looked_at(
                pipe,
                oracle,
                place(given.out, item.name, label),
                toybox.subject_prompt(pair, "slate"),
                given.seeds,
                lambda _, seen, own=pair: both(seen, own),
                **options,
            )
    table(rows, "presence rate", "normalized")


def both(seen: Sequence[Detection], pair: Sequence[Subject]) -> Row:
    """How many of both there are in their own looks, who, and how many things of the class there are at all."""
    things = [thing for thing in seen if thing.class_name == pair[0].class_name]
    there = [any(thing.look == item.look for thing in things) for item in pair]
    return {
        "presence rate": sum(there) / 2,
        "both": float(all(there)),
        "the named one": float(there[0]),
        "the anonymous one": float(there[1]),
        "things of the class": float(len(things)),
    }


if __name__ == "__main__":
    main()
