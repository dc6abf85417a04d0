"""The options of the commands that train gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mole_diffusion.choices import PRESETS

Lora = Annotated[
    list[str],
    typer.Option(metavar="NAME=FILE", help="A LoRA; once for each, two at least. A toybox subject needs only NAME."),
]


Token = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=TOKEN", help="Rare token of a LoRA, which CLIP must not read; once for each."),
]


ClassName = Annotated[
    list[str] | None,
    typer.Option("--class", metavar="NAME=CLASS", help="What kind of thing a LoRA draws; read in the token's place."),
]


Description = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=TEXT", help='What CLIP reads instead of the class: cat="orange striped cat".'),
]


References = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=FOLDER", help="Pictures of a concept for local and identity terms [default: drawn]."),
]


Prompt = Annotated[list[str] | None, typer.Option(help="A prompt to train on; once for each.")]


Prompts = Annotated[Path | None, typer.Option(help="Text file with a prompt in every line; # starts a comment line.")]


Template = Annotated[
    list[str] | None,
    typer.Option(help='A prompt with the place {concepts}, filled in every order: "a photo of {concepts} on grass".'),
]


Clip = Annotated[
    str | None,
    typer.Option(help="CLIP that guides: an open_clip folder or architecture [default with the toybox: its own]."),
]


ClipPretrained = Annotated[str | None, typer.Option(help="Weights of that architecture, such as laion2b_s34b_b79k.")]


Preset = Annotated[str | None, typer.Option(help=", ".join(PRESETS))]


ConfigFile = Annotated[Path | None, typer.Option(help="YAML with settings, such as `gates: {scope: layer}`.")]


Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting: local_weight=0.5, gates.scope=layer …"),
]


Steps = Annotated[int | None, typer.Option(min=1, help="Training steps [default: the preset's].")]


BatchSize = Annotated[int | None, typer.Option(min=1, help="Pictures a step [default: the preset's].")]


LearningRate = Annotated[float | None, typer.Option(help="Peak of the learning rate [default: the preset's].")]


Seed = Annotated[int | None, typer.Option(help="Of everything random.")]
