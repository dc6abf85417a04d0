"""`mole demo`: three LoRAs in one picture, every way there is, and which LoRA got which weight where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .inputs import Device, pick_device, quiet_loading

if TYPE_CHECKING:
    from PIL import Image
    from rich.table import Table

    from mole_diffusion.gating import GateRecord

GROUND = "grass"
NUM_SEEDS = 3


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("outputs/demo"),
    seed: Annotated[int, typer.Option(help="First of three seeds.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 3.0,
    device: Device = "auto",
) -> None:
    """Compose three subjects of the toybox with learned gates, beside the plain ways of composing them.

    Writes a picture sheet and a heat map of the gates, and prints which LoRA got which weight where.

    Examples:

    \b
      mole demo
      mole demo --seed 10 --steps 50 --out my-demo
    """
    from rich.console import Console

    from mole_diffusion import toybox
    from mole_diffusion.sheets import gate_heat_map, picture_sheet

    where = pick_device(device)
    names = toybox.demo_subjects()
    pipe = _load(names, where)
    prompt = toybox.subject_prompt(names, GROUND)

    def draw(prompt: str, loras: list[str] | None, composition: str) -> list[Image.Image]:
        import torch

        pipe.set_composition(composition)
        generators = [torch.Generator().manual_seed(seed + k) for k in range(NUM_SEEDS)]
        options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        return pipe([prompt] * NUM_SEEDS, loras=loras, generator=generators, **options).images

    rows = [("\n".join(["references:", *names]), [toybox.references(name)[0] for name in names])]
    rows += [
        (f"{name} alone\n{toybox.token(name)}", draw(toybox.subject_prompt([name], GROUND), [name], "linear"))
        for name in names
    ]
    rows.append(("plain sum", draw(prompt, None, "linear")))
    rows.append(("normalised sum", draw(prompt, None, "normalized")))
    with pipe.gates.record(accumulate=True) as record:
        rows.append(("learned gates", draw(prompt, None, "mole")))
    rows.append((f"learned gates,\n{names[-1]} masked", draw(prompt, names[:-1], "mole")))

    sheet = picture_sheet(rows, out / "sheet.png", title=prompt, cell=192)
    table = record.table()
    shown = table.values.masked_fill(~record.present(), float("nan"))
    heat_map = gate_heat_map(shown, table.places, table.loras, out / "gates.png", title="mean gate weights")
    console = Console(highlight=False)
    console.print(f'"{prompt}", with gates, seeds {seed} to {seed + NUM_SEEDS - 1}:', markup=False)
    console.print(_gate_table(record))
    typer.echo(f"gates as a heat map: {heat_map.resolve()}\npicture sheet: {sheet.resolve()}")


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
    printed = Table("place", title="which LoRA got which weight where")
    for name in table.loras:
        printed.add_column(Text(name), justify="right")
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
