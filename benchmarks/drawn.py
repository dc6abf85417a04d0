"""What the scripts beside this one share: pictures of the toybox, drawn and looked at once, and a table of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mole_diffusion import MoLEStableDiffusionPipeline, toybox
from mole_diffusion.benchmark.stats import paired_bootstrap
from mole_diffusion.files import file_name, write_json
from mole_diffusion.toybox.oracle import Detection
from mole_diffusion.toybox.recipe.measure_pictures import measure_base, measure_named
from mole_diffusion.toybox.subjects import Subject, subject

STEPS, GUIDANCE_SCALE = 25, 2.0
Row = dict[str, float]


def toybox_pipeline() -> Any:
    pipe = MoLEStableDiffusionPipeline.from_pretrained(toybox.base_dir())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(pipe: Any, items: Sequence[Subject], files: Mapping[str, Path]) -> None:
    """The LoRAs of these subjects in the place of those that are loaded."""
    pipe.unload_loras()
    pipe.load_loras(
        {item.name: files.get(item.name) or toybox.lora_path(item.name) for item in items},
        triggers={item.name: item.trigger for item in items},
    )


def shown_of_three(pipe: Any, pictures: int) -> dict[str, float]:
    """What a base shows of three things: looks named in words, each and all of them, and classes, all of them."""
    presence, all_three = measure_named(pipe, num_pictures=pictures, seed=1)
    classes, _ = measure_base(pipe, 3, num_pictures=pictures, seed=1)
    return {"presence": presence, "all three": all_three, "three classes": classes}


def looked_at(
    pipe: Any,
    oracle: Any,
    file: Path,
    prompt: str,
    seeds: int,
    look: Callable[[Image.Image, Sequence[Detection]], Row],
    **options: Any,
) -> list[Row]:
    """What `look` says of each picture of a prompt; kept in a file, so that a run may be stopped and started again."""
    if not file.exists():
        generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        drawn = pipe(
            [prompt] * seeds,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=generators,
            **options,
        ).images
        rows = [look(*pair) for pair in zip(drawn, oracle.detect(drawn), strict=True)]
        write_json(file, rows)
        print(f"{file.stem}: " + ", ".join(f"{key} {_mean(rows, key):.2f}" for key in rows[0]), flush=True)
    rows = json.loads(file.read_text())
    if len(rows) != seeds:
        raise SystemExit(f"{file} has {len(rows)} pictures and not {seeds}; give another --out.")
    return list(rows)


def place(out: Path, *parts: str) -> Path:
    return out / f"{file_name('.'.join(parts))}.json"


def table(rows: Mapping[str, list[Row]], compared: str, reference: str) -> None:
    """Means by label, and differences of one number to a reference, paired by picture, with 95 % intervals."""
    keys = list(next(iter(rows.values()))[0])
    width = max(map(len, rows)) + 2
    print(f"{'':{width}s}" + "".join(f"{key:>20s}" for key in keys) + f"   {compared} over {reference}")
    for label, measured in rows.items():
        means = "".join(f"{_mean(measured, key):20.3f}" for key in keys)
        own, other = ({k: row[compared] for k, row in enumerate(side)} for side in (measured, rows[reference]))
        difference, low, high = paired_bootstrap(own, other)
        print(f"{label:{width}s}{means}   {difference:+.3f} [{low:+.3f}, {high:+.3f}], {len(measured)} pictures")


def named(names: Sequence[str]) -> list[Subject]:
    return [subject(name) for name in names]


def _mean(rows: Sequence[Row], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))
