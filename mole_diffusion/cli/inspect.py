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

    from mole_diffusion.lora import inspect_lora

    report = inspect_lora(file)
    ranks = ", ".join(f"{rank} ({count} modules)" for rank, count in report.ranks.items())
    table = Table(title=report.source, show_header=False, title_justify="left")
    table.add_row("layout", report.layout)
    table.add_row("made for", report.family)
    table.add_row("modules", ", ".join(f"{count} in {component}" for component, count in report.modules.items()))
    table.add_row("ranks", ranks)
    table.add_row("alphas", ", ".join(f"{alpha:g}" for alpha in report.alphas) or "none: scaling 1")
    table.add_row("called by", ", ".join(report.triggers) or "no words named in the file")
    table.add_row("SHA-256", report.sha256)
    Console(markup=False, highlight=False).print(table)
