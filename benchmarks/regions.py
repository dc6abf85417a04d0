"""Whether things stand in the boxes they are given: `python benchmarks/regions.py`.

Of a thing that its LoRA draws alone, from the same noise and on the same ground, as often as not in its look: is it in
its box, in its look, when it is drawn beside others with `regions=`?
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from drawn import Row, load, looked_at, named, place, table, toybox_pipeline

from mole_diffusion import toybox
from mole_diffusion.composition import Masks
from mole_diffusion.toybox.oracle import Detection
from mole_diffusion.toybox.subjects import Subject
from mole_diffusion.toybox.world import IMAGE_SIZE

Box = tuple[float, float, float, float]
COMPOSITIONS = ("cat+boot", "mug+fish", "robot+house", "cat+house+teapot", "boot+clock+flower", "robot+teapot+car")
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
BOXES: dict[int, tuple[Box, ...]] = {
    2: (LEFT, RIGHT),
    3: ((0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), (0.25, 0.5, 0.75, 1.0)),
}
METHODS = {
    "regions": Masks(),
    "regions, no attention bias": Masks(given_own_words=0.0, given_others_words=0.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/regions"))
    parser.add_argument("--compositions", nargs="+", default=list(COMPOSITIONS), help="two or three subjects each")
    parser.add_argument("--seeds", type=int, default=10, help="pictures for each composition")
    given = parser.parse_args()

    pipe, oracle = toybox_pipeline(), toybox.Oracle()
    found: dict[str, list[Row]] = {label: [] for label in METHODS}
    for composition in given.compositions:
        items = named(composition.split("+"))
        boxes = {item.name: box for item, box in zip(items, BOXES[len(items)], strict=True)}
        load(pipe, items, {})
        together = {}
        for label, method in METHODS.items():
            pipe.set_composition(method)
            together[label] = looked_at(
                pipe,
                oracle,
                place(given.out, composition, label),
                toybox.subject_prompt(items, "slate"),
                given.seeds,
                lambda _, seen, own=items, where=boxes: {
                    key: value for item in own for key, value in stands(seen, item, where[item.name]).items()
                },
                regions=boxes,
            )
        pipe.set_composition("masks")
        for item in items:
            alone = looked_at(
                pipe,
                oracle,
                place(given.out, item.name, "alone"),
                toybox.subject_prompt([item], "slate"),
                given.seeds,
                lambda _, seen, own=item: stands(seen, own, (0.0, 0.0, 1.0, 1.0)),
                loras=[item.name],
            )
            for label, rows in together.items():
                for by_itself, beside in zip(alone, rows, strict=True):
                    if by_itself[f"{item.name} in its box"]:
                        found[label].append(
                            {
                                "in its box": beside[f"{item.name} in its box"],
                                "there, in any look": beside[f"{item.name} there in any look"],
                                "elsewhere": beside[f"{item.name} elsewhere"],
                            }
                        )
    print("of things that the LoRA alone draws:")
    table(found, "in its box", "regions, no attention bias")


def stands(seen: Sequence[Detection], item: Subject, box: Box) -> Row:
    """Where a subject stands, by the middle of what the oracle found."""
    own = [thing for thing in seen if thing.class_name == item.class_name]
    inside = [thing for thing in own if _middle_in(thing, box)]
    right = [thing for thing in inside if thing.look == item.look]
    return {
        f"{item.name} in its box": float(bool(right)),
        f"{item.name} there in any look": float(bool(inside)),
        f"{item.name} elsewhere": float(bool(own) and not inside),
    }


def _middle_in(thing: Detection, box: Box) -> bool:
    x, y = ((thing.box[k] + thing.box[k + 2]) / 2 / IMAGE_SIZE for k in (0, 1))
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


if __name__ == "__main__":
    main()
