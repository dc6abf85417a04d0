"""The `mole` command and what it says when something is wrong."""

from __future__ import annotations

import io
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mole_diffusion import __version__
from mole_diffusion.errors import MoLEError, printable
from mole_diffusion.reading import is_text

from .app_page import app_page
from .balance_study import balance_study
from .benchmark import benchmark
from .convert import convert
from .demo import demo
from .edge import MENDABLE, one_line
from .evaluate import evaluate
from .generate import generate
from .inspect import inspect
from .methods import methods
from .space import space
from .speed import speed
from .toybox import toybox
from .train_gates import train_gates
from .train_lora import train_lora

BAD_INPUT, INTERRUPTED = 2, 130
MAY_BE_EMPTY = ("--only", "--negative-prompt")  # nobody, and nothing


class OneLineErrors(TyperGroup):
    """The one place where errors that a user can mend become a line on standard error and exit code 2."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **kwargs: Any) -> Any:
        with _one_line():
            for before, argument in zip(["", *args], args, strict=False):
                if not is_text(argument):
                    raise MoLEError(
                        f"'{printable(argument)}' is not UTF-8. Write it as text, and give files such names."
                    )
                _refuse_empty(before, argument)
            return super().make_context(info_name, args, *rest, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _one_line(with_traceback=bool(ctx.params.get("traceback"))):
            return super().invoke(ctx)


@contextmanager
def _one_line(with_traceback: bool = False) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("mole: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except typer.TyperException as error:  # an option that does not exist, is missing, or has no such value
        if type(error).__name__ == "NoArgsIsHelpError":  # shows the help, and typer does not export it
            raise
        context = getattr(error, "ctx", None)
        hint = "" if context is None else f" See: {context.command_path} --help"
        _say(f"{error.format_message().rstrip('.')}.{hint}")
        raise typer.Exit(BAD_INPUT) from None
    except MENDABLE as error:
        if with_traceback:
            traceback.print_exc()
        _say(one_line(error))
        raise typer.Exit(BAD_INPUT) from None


def _refuse_empty(before: str, argument: str) -> None:
    """Raises MoLEError for an argument of no letters, as a shell makes of a variable that is not set.

    A path would be the folder one is in, and what lies there be read or written.
    """
    option, value = before, argument
    if argument.startswith("--") and "=" in argument:
        option, _, value = argument.partition("=")
    if value or option in MAY_BE_EMPTY:
        return
    what = option if option.startswith("--") else "an argument"
    raise MoLEError(f"{what} is empty. Give it a value, or leave it out.")


def _say(message: str) -> None:
    typer.echo(f"mole: {' '.join(message.split())}", err=True)


class _Said(logging.Handler):
    """What the library logs, as the other lines of the command line."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(record.getMessage())


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,  # messages and help hold [lists] and <v1> tokens, which are no markup
    pretty_exceptions_enable=False,
    help="Several concept LoRAs in one picture: Mixture of LoRA Experts for diffusers.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mole {__version__}")
        raise typer.Exit


@app.callback()
def _mole(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which version this is.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the code an error came from, not only what it is.")
    ] = False,
) -> None:
    """What stands before a command."""
    # The library logs; here it is heard, on standard error.
    logger = logging.getLogger("mole_diffusion")
    logger.handlers = [_Said()]
    logger.setLevel(logging.INFO)


app.command()(demo)
app.command()(generate)
app.command("app")(app_page)
app.command()(space)
app.command()(inspect)
app.command()(convert)
app.command()(methods)
app.command()(evaluate)
app.command()(speed)
app.command("train-lora")(train_lora)
app.command("train-gates")(train_gates)
app.command("balance-study")(balance_study)
app.add_typer(benchmark, name="benchmark")
app.add_typer(toybox, name="toybox")


def main() -> None:
    """Entry point of the `mole` script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # where a terminal or a log has no sign for it, "?" stands
    app(prog_name="mole")
