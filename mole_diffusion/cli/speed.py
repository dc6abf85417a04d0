"""`mole speed`: what composing costs."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..drawing.opening import pick_device
from .inputs import Device


def speed(
    size: Annotated[
        str,
        typer.Option(help="tiny, toybox, 142m, sd15, sdxl, sd3, flux or z_image: random weights, real shapes."),
    ] = "142m",
    loras: Annotated[
        str | None,
        typer.Option(help="How many LoRAs, a table row for each: 1,3,8,32. [default: 1,3,8; 3 with --count]"),
    ] = None,
    used: Annotated[int | None, typer.Option(help="How many of them a call keeps; by default all.")] = None,
    batch: Annotated[int, typer.Option(help="Rows of the latents; 2 is one picture with guidance.")] = 2,
    rank: Annotated[int, typer.Option(help="Of every LoRA.")] = 16,
    targets: Annotated[str, typer.Option(help="Modules with factors: attention, all or conv.")] = "all",
    sides: Annotated[
        str,
        typer.Option(
            help="What stands beside one another, some of: bare,empty,sum,products,joined,budget,norm_router,masks,"
            "gates,gated,routed,fused,peft,merged."
        ),
    ] = "bare,empty,sum,gates,masks,fused,peft,merged",
    rounds: Annotated[int, typer.Option(help="How often all sides take their turn.")] = 6,
    latent: Annotated[int | None, typer.Option(help="Side of the latents; 64 is a picture of 512 pixels.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; by default bfloat16 on a GPU, for real sizes.")
    ] = None,
    device: Device = "cpu",
    threads: Annotated[int, typer.Option(help="Of the CPU.")] = 1,
    train: Annotated[bool, typer.Option("--train", help="Also a step of gate training.")] = False,
    walks: Annotated[
        bool, typer.Option("--walks", help="Also whole steps of gate training by the preset real, at size sd15.")
    ] = False,
    inside: Annotated[
        bool, typer.Option("--inside", help="Also what calls spend on LoRAs, module by module, on a CPU.")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the bare model and ours.")] = False,
    compiled_blocks: Annotated[
        bool, typer.Option("--compile-blocks", help="Compile their repeated blocks alone, in a fraction of the time.")
    ] = False,
    pipeline: Annotated[
        bool, typer.Option("--pipeline", help="Also whole calls of the toybox's pipeline beside diffusers' own.")
    ] = False,
    whole: Annotated[
        bool,
        typer.Option("--whole", help="All tables of the documentation's page instead; half an hour on two cores."),
    ] = False,
    count: Annotated[
        bool,
        typer.Option("--count", help="Operations and memory of real bases instead, counted on models without values."),
    ] = False,
    page: Annotated[Path | None, typer.Option(help="Write a page of Markdown here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
) -> None:
    """Measure what LoRAs cost beside the bare model, peft and merged weights: time, memory, loading, operations.

    Example:

    \b
      mole speed --size 142m --loras 1,3,8 --page speed.md
    """
    from mole_diffusion.errors import MoLEError
    from mole_diffusion.speed.config import WHOLE, SpeedConfig

    if loras is None:
        loras = "3" if count else "1,3,8"
    try:
        numbers = tuple(int(part) for part in loras.split(","))
    except ValueError:
        raise MoLEError(f"--loras takes whole numbers with commas between, such as 1,3,8, got {loras!r}.") from None
    if dtype not in (None, "float32", "bfloat16"):
        raise MoLEError(f"--dtype is float32 or bfloat16, got {dtype!r}.")
    settings: dict[str, Any] = {"sides": tuple(part.strip() for part in sides.split(",")), "dtype": dtype}
    config = SpeedConfig(
        size=size,
        loras=numbers,
        used=used,
        batch=batch,
        rank=rank,
        targets=targets,
        rounds=rounds,
        latent=latent,
        threads=threads,
        train=train,
        inside=inside,
        walks=walks,
        compiled="blocks" if compiled_blocks else "whole" if compiled else None,
        pipeline=pipeline,
        **settings,
    )
    if count and (len(numbers) > 1 or page or json_file):
        raise MoLEError(
            "--count prints one table for one number of LoRAs: give --loras 3, say, and neither --page nor --json."
        )
    from mole_diffusion.files import try_file, write_last, write_text

    for file in (page, json_file):
        if file is not None:
            try_file(file)
    config = replace(config, device=str(pick_device(device)))
    import json

    from rich.console import Console

    from mole_diffusion.speed import measure_speed, speed_page
    from mole_diffusion.speed.count import BASES, count_base
    from mole_diffusion.speed.page import count_table, saved_table, speed_tables, walk_table
    from mole_diffusion.speed.train import saved_activations, walk_operations

    if count:
        with Console(stderr=True).status("counting") as status:
            counts = []
            for base, name in BASES.items():
                status.update(f"counting: {name}")
                counts.append(count_base(base, loras=numbers[0], rank=rank, targets=targets))
        typer.echo(count_table(counts, numbers[0], rank))
        return
    configs = WHOLE if whole else (config,)
    with Console(stderr=True).status("measuring") as status:
        measured = []
        for one in configs:
            measured.append(measure_speed(one, lambda text: status.update(f"measuring: {text}")))
            typer.echo(f"{speed_tables(measured[-1])}\n")
        more = []
        if whole:
            status.update("counting what training keeps")
            kept = {name: saved_activations(SpeedConfig(size=name, loras=(3,)), 3) for name in ("142m", "sd15")}
            walks_of = {name: walk_operations(SpeedConfig(size=name, loras=(3,)), 3) for name in kept}
            more += [saved_table(kept), walk_table(walks_of)]
            for table in more:
                typer.echo(f"{table}\n")
    if page is not None:
        given = {
            "size": size,
            "loras": loras,
            "used": used,
            "batch": batch,
            "rank": rank,
            "targets": targets,
            "rounds": rounds,
        }
        given |= {"sides": sides, "latent": latent, "dtype": dtype, "device": device, "threads": threads}
        words = [f"--{name} {value}" for name, value in given.items() if value is not None]
        asked = {
            "train": train,
            "inside": inside,
            "walks": walks,
            "compile": compiled,
            "compile-blocks": compiled_blocks,
            "pipeline": pipeline,
        }
        flags = [f"--{name}" for name, on in asked.items() if on]
        command = ["mole speed --whole"] if whole else ["mole speed", *words, *flags]
        text = speed_page(measured, " ".join(command), *more)
        write_last(page, lambda path: write_text(path, text))
    if json_file is not None:
        found = json.dumps([asdict(speed) for speed in measured], indent=1)
        write_last(json_file, lambda path: write_text(path, found))
