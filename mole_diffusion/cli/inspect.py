"""`mole inspect`: what is in a LoRA file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(file: Annotated[Path, typer.Argument(help="A LoRA, .safetensors.")]) -> None:
    """Say what is in a LoRA file: layout, components, ranks, scaling, what base model it is for, what words call it.

    Example:

    \b
      mole inspect cat.safetensors
    """
    from rich.console import Console
    from rich.table import Table

    from mole_diffusion.errors import printable
    from mole_diffusion.lora import inspect_lora

    report = inspect_lora(file)
    ranks = [f"{rank} ({count} modules)" for rank, count in report.ranks.items()]
    # A file's name may hold anything, escape sequences of terminals too.
    table = Table(title=printable(report.source), show_header=False, title_justify="left")
    table.add_row("layout", report.layout)
    table.add_row("made for", report.family)
    table.add_row("modules", ", ".join(f"{count} in {component}" for component, count in report.modules.items()))
    table.add_row("ranks", _few(ranks))
    table.add_row("alphas", _few([f"{alpha:g}" for alpha in report.alphas]) or "none: scaling 1")
    table.add_row("scaling", _few([f"{scaling:g}" for scaling in report.scalings]))
    table.add_row(
        "called by", _few([printable(trigger) for trigger in report.triggers]) or "no words named in the file"
    )
    table.add_row("SHA-256", report.sha256)
    Console(markup=False, highlight=False).print(table)


def _few(words: list[str], shown: int = 8) -> str:
    return ", ".join(words[:shown]) + (f" and {len(words) - shown} more" if len(words) > shown else "")
