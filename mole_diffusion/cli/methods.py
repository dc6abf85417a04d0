"""`mole methods`: the ways to compose LoRAs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mole_diffusion.composition import Composition

COUNTS = (1, 2, 3)


def methods() -> None:
    """List the composition methods: where each comes from, what a step costs, and what it needs.

    The cost is the number of UNet evaluations a step for one, two and three LoRAs.

    Example:

    \b
      mole methods
    """
    from rich.console import Console
    from rich.table import Table

    from mole_diffusion.composition import COMPOSITIONS

    table = Table("method", "UNet evaluations a step", "needs", "source")
    for name, method in COMPOSITIONS.items():
        cost = ", ".join(f"{method().evaluations(count):g}" for count in COUNTS)
        table.add_row(name, cost, _needs(method()), method.source)
    Console(markup=False, highlight=False).print(table)


NEEDS = {"gates": "trained gates", "words": "trigger words"}


def _needs(method: Composition) -> str:
    return ", ".join(text for need, text in NEEDS.items() if need in method.needs) or "–"
