"""`mole demo`: three LoRAs in one picture, every way there is, and which LoRA got which weight where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mole_diffusion.files import try_folder, write_last

from ..drawing.opening import pick_device, quiet_loading
from ..drawing.settings import LARGEST_SEED
from .inputs import Device

if TYPE_CHECKING:
    from PIL import Image
    from rich.table import Table

    from mole_diffusion.gating import GateRecord

SHEET, FIRST, HEAT_MAP = "sheet.png", "first.png", "gates.png"
GROUND = "grass"
NUM_SEEDS = 3
# A place for each of the three subjects, as fractions of the picture: left, top, right, bottom.
BOXES = [(0.0, 0.0, 0.5, 0.6), (0.5, 0.0, 1.0, 0.6), (0.25, 0.55, 0.75, 1.0)]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("outputs/demo"),
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED - NUM_SEEDS, help="First of three seeds.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option(min=0, help="Classifier-free guidance.")] = 2.0,
    device: Device = "auto",
) -> None:
    """Compose three subjects of the toybox: by default, with regions of your own, and in other ways beside these.

    Writes a picture sheet, a strip of what goes in and what comes out at the first seed, and a heat map of learned
    gates; prints which LoRA got which weight where.

    Examples:

    \b
      mole demo
      mole demo --seed 10 --steps 50 --out my-demo
    """
    try_folder(out)
    where = pick_device(device)
    from rich.console import Console

    from mole_diffusion import toybox
    from mole_diffusion.sheets import gate_heat_map, picture_sheet

    names = toybox.demo_subjects()
    pipe = _load(names, where)
    prompt = toybox.subject_prompt(names, GROUND)
    boxes = dict(zip(names, BOXES, strict=True))

    def draw(composition: str | None, **options: Any) -> list[Image.Image]:
        return _draw(prompt, composition, range(seed, seed + NUM_SEEDS), **options)

    def _draw(prompt: str, composition: str | None, seeds: Sequence[int], **options: Any) -> list[Image.Image]:
        import torch

        pipe.set_composition(composition)
        generators = [torch.Generator().manual_seed(number) for number in seeds]
        options |= {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        return pipe([prompt] * len(seeds), generator=generators, **options).images

    references = [toybox.references(name)[0] for name in names]
    alone = [
        _draw(toybox.subject_prompt([name], GROUND), "linear", [seed + index], loras=[name])[0]
        for index, name in enumerate(names)
    ]
    found = draw(None)
    found_masks = pipe.masks.overlay(found)
    placed = draw(None, regions=boxes)
    placed_masks = pipe.masks.overlay(placed)
    three = ", ".join(names[:-1]) + f" and {names[-1]}"
    rows = [
        (f"what the LoRAs learnt:\n{three}", references),
        ('by default, "masks":\neach LoRA acts where\nits subject will be,\nno training', found),
        ("where each LoRA acted\nin the row above:\npipe.masks", found_masks),
        ('"norm_router":\nno words, no masks', draw("norm_router")),
        ("boxes of your own:\nregions={…}", placed),
        ("the boxes of\nthe row above", placed_masks),
        ('"normalized":\nevery LoRA at 1/3', draw("normalized")),
        ('"linear": plain sum,\nevery LoRA in full', draw("linear")),
    ]
    with pipe.gates.record(accumulate=True) as record:
        rows.append(('"mole": gates\ntrained for these\nthree LoRAs', draw("mole")))
    rows.append((f"the same gates,\nthe {names[-1]}'s LoRA\nmasked out", draw("mole", loras=names[:-1])))
    rows.append((f"{three},\neach LoRA alone,\nfor comparison", alone))

    table = record.table()
    shown = table.values.masked_fill(~record.present(), float("nan"))
    columns = [*(f"{name}.safetensors" for name in names), "all three", "which acted where"]

    def write(folder: Path) -> None:
        strip = [("", [*references, found[0], found_masks[0]])]
        picture_sheet(rows, folder / SHEET, title=prompt, cell=192)
        picture_sheet(strip, folder / FIRST, title=prompt, columns=columns, cell=192)
        gate_heat_map(shown, table.places, table.loras, folder / HEAT_MAP, title="mean gate weights")

    write_last(out, write)
    console = Console(highlight=False)
    console.print(f'"{prompt}", with gates, seeds {seed} to {seed + NUM_SEEDS - 1}:', markup=False)
    console.print(_gate_table(record))
    for what, name in (("gates as a heat map", HEAT_MAP), ("picture sheet", SHEET), ("in a strip", FIRST)):
        typer.echo(f"{what}: {(out / name).resolve()}")


def _load(names: list[str], device: Any) -> Any:
    from mole_diffusion import toybox
    from mole_diffusion.pipelines import MoLEStableDiffusionPipeline

    with quiet_loading():
        pipe = MoLEStableDiffusionPipeline.from_pretrained(toybox.base_dir()).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_loras({name: toybox.lora_path(name) for name in names})
    pipe.load_gates(toybox.gates_dir("+".join(names)))
    return pipe


def _gate_table(record: GateRecord) -> Table:
    """Mean weight of each LoRA at each place, the largest of a row marked; a dash where a LoRA has nothing."""
    from rich.table import Table
    from rich.text import Text

    table, present = record.table(), record.present()
    printed = Table(title="which LoRA got which weight where")
    # In a narrow terminal names go on in the next line: cut at the end, many of them would look alike.
    printed.add_column("place", overflow="fold")
    for name in table.loras:
        printed.add_column(Text(name), justify="right", no_wrap=True)
    for place, weights, there in zip(table.places, table.values.tolist(), present.tolist(), strict=True):
        cells = [
            Text(f"{weight:.2f}" if has else "–", style="bold green" if weight == max(weights) else "")
            for weight, has in zip(weights, there, strict=True)
        ]
        printed.add_row(Text(place), *cells)
    mean = table.values.mean(dim=0).tolist()
    printed.add_section()
    printed.add_row("mean", *(f"{weight:.2f}" for weight in mean))
    return printed
