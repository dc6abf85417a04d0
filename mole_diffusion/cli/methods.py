"""`mole methods`: the ways to compose LoRAs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mole_diffusion.composition import Composition

COUNTS = (1, 2, 3)
NEEDS = {"gates": "trained gates", "words": "trigger words"}
CAT = "LoRA Soups (arXiv 2410.13025): mole with one learned number for each LoRA and matrix, by `mole benchmark`"


def methods() -> None:
    """List the composition methods: what a step costs, what each needs, and where it comes from.

    The cost is the number of UNet evaluations a step for one, two and three LoRAs.

    Example:

    \b
      mole methods
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from mole_diffusion.benchmark.methods import TRAINED_METHODS
    from mole_diffusion.composition import COMPOSITIONS

    table = Table(box=box.ROUNDED, show_lines=True)
    table.add_column("method", no_wrap=True)
    table.add_column(f"UNet evaluations a step for {_listed(COUNTS)} LoRAs", max_width=16, overflow="fold")
    table.add_column("needs", overflow="fold")
    table.add_column("source", min_width=10, overflow="fold")
    listed = {name: (method(), method.source) for name, method in COMPOSITIONS.items()}
    others = {name: composition for name, (composition, _) in TRAINED_METHODS.items() if name not in COMPOSITIONS}
    listed |= {name: (COMPOSITIONS[composition](), CAT) for name, composition in others.items()}
    for name, (method, source) in listed.items():
        cost = ", ".join(f"{method.evaluations(count):g}" for count in COUNTS)
        table.add_row(name, cost, _needs(method), source)
    Console(markup=False, highlight=False).print(table)


def _listed(counts: tuple[int, ...]) -> str:
    return ", ".join(map(str, counts))


def _needs(method: Composition) -> str:
    return ",\n".join(text for need, text in NEEDS.items() if need in method.needs) or "–"
