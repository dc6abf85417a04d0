"""How good the toybox's base is after how many scenes: `python benchmarks/toybox_curve.py 377000=FOLDER ...`.

Each point is a diffusers folder of the base, such as `runs/toybox/assets/base`, with the number of scenes it has seen.
The oracle counts pictures that show all of one to six classes named, and things in the look that words name; the rates
are plotted and printed. A point that was measured is not measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from diffusers import StableDiffusionPipeline

from mole_diffusion.drawing.opening import pick_device
from mole_diffusion.files import write_json
from mole_diffusion.tables import markdown_table, number
from mole_diffusion.toybox.recipe.measure_pictures import measure_base, measure_named

FLOORS = {1: 0.98, 2: 0.95, 3: 0.90, 4: 0.80, 5: 0.65, 6: 0.50}
LOOKS, LOOKS_FLOOR = "things in the look named", 0.90


def measured(folder: Path, pictures: int, device: str) -> dict[str, float]:
    """Rates of one base: by number of classes the share of pictures that show all, and the share of looks."""
    pipe = StableDiffusionPipeline.from_pretrained(folder).to(pick_device(device))
    rows = {str(n): measure_base(pipe, n, num_pictures=pictures)[0] for n in range(1, 7)}
    return rows | {LOOKS: measure_named(pipe, num_pictures=pictures)[0]}


def plot(points: dict[int, dict[str, float]], out: Path) -> None:
    """A line for each row, and its floor as a dotted line of the same colour."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    scenes = sorted(points)
    floors: dict[str, float] = {str(n): floor for n, floor in FLOORS.items()} | {LOOKS: LOOKS_FLOOR}
    for k, (row, floor) in enumerate(floors.items()):
        label = row if row == LOOKS else f"all of {row} classes"
        axes.plot(scenes, [100 * points[n][row] for n in scenes], "o-", color=f"C{k}", label=label)
        axes.axhline(100 * floor, color=f"C{k}", linestyle=":", linewidth=0.8)
    axes.set(xscale="log", xlabel="scenes seen", ylabel="%", ylim=(0, 102), title="The toybox's base (dotted: floors)")
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(out, dpi=110)


def point(text: str) -> tuple[int, Path]:
    scenes, _, folder = text.partition("=")
    return int(scenes), Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("points", nargs="+", type=point, metavar="SCENES=FOLDER")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=Path, default=Path("outputs/toybox_curve.json"), help="what was measured")
    parser.add_argument("--out", type=Path, default=Path("outputs/toybox_curve.png"))
    given = parser.parse_args()
    for file in (given.rows, given.out):
        file.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = json.loads(given.rows.read_text()) if given.rows.exists() else {}
    for scenes, folder in given.points:
        if str(scenes) not in rows:
            rows[str(scenes)] = measured(folder, given.pictures, given.device)
            write_json(given.rows, rows)
    points = {scenes: rows[str(scenes)] for scenes, _ in given.points}
    plot(points, given.out)
    heads = [*map(str, FLOORS), LOOKS]
    table = [[f"{n:,}", *(number(100 * points[n][head], 1) for head in heads)] for n in sorted(points)]
    print(markdown_table(["scenes", *heads], table))


if __name__ == "__main__":
    main()
