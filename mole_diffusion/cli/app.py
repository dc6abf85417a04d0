"""The `mole` command and what it says when something is wrong."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from .balance_study import balance_study
from .benchmark import benchmark
from .demo import demo
from .edge import MENDABLE, one_line
from .evaluate import evaluate
from .generate import generate
from .inspect import inspect
from .methods import methods
from .toybox import toybox
from .train_gates import train_gates
from .train_lora import train_lora

BAD_INPUT, INTERRUPTED = 2, 130


class OneLineErrors(TyperGroup):
    """The one place where errors that a user can mend become a line on standard error and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("mole: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except MENDABLE as error:
            typer.echo(f"mole: {one_line(error)}", err=True)
            raise typer.Exit(BAD_INPUT) from None


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # messages and help hold [lists] and <v1> tokens, which are no markup
    pretty_exceptions_enable=False,
    help="Several concept LoRAs in one picture: Mixture of LoRA Experts for diffusers.",
)
app.command()(demo)
app.command()(generate)
app.command()(inspect)
app.command()(methods)
app.command()(evaluate)
app.command("train-lora")(train_lora)
app.command("train-gates")(train_gates)
app.command("balance-study")(balance_study)
app.add_typer(benchmark, name="benchmark")
app.add_typer(toybox, name="toybox")


def main() -> None:
    """Entry point of the `mole` script."""
    app()
