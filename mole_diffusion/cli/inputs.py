"""What several commands read from the command line in the same way."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MoLEError

if TYPE_CHECKING:
    from PIL import Image

Device = Annotated[str, typer.Option(help="cpu, cuda, mps …; auto takes a GPU if there is one.")]
Base = Annotated[str, typer.Option(help='Base model: a folder, a Hub id, or "toybox" for the one that comes along.')]
BaseDtype = Annotated[
    str,
    typer.Option("--dtype", help="Number format of the base: float32 or bfloat16. What is trained is float32 in both."),
]


def read_pairs(option: str, pairs: Sequence[str], example: str = "cat=cat.safetensors") -> dict[str, str]:
    """`["cat=cat.safetensors", …]` as a dict.

    Raises:
        MoLEError: An entry has no name or no value, or a name comes twice.
    """
    found = read_several(option, pairs, example)
    for name, values in found.items():
        if len(values) > 1:
            raise MoLEError(f"{option} has the name {name!r} twice, for {values[0]} and {values[1]}.")
    return {name: value for name, (value,) in found.items()}


def read_paths(option: str, pairs: Sequence[str], example: str = "cat=cat.safetensors") -> dict[str, str]:
    """`read_pairs` of files and folders: shells leave `cat=~/cat.safetensors` as it is, so ~ is the home here.

    Raises:
        MoLEError: As in `read_pairs`.
    """
    return {name: os.path.expanduser(path) for name, path in read_pairs(option, pairs, example).items()}


def check_base_dtype(name: str) -> None:
    """Raises MoLEError unless something can be trained on a base in it: in float16 small gradients become zero."""
    if name not in (formats := ("float32", "bfloat16")):
        raise MoLEError(f"--dtype {name}: must be one of {', '.join(formats)}, where something is trained.")


def read_several(option: str, pairs: Sequence[str], example: str) -> dict[str, list[str]]:
    """`["cat=a", "cat=b", …]` as a dict of lists.

    Raises:
        MoLEError: An entry has no name or no value.
    """
    found: dict[str, list[str]] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not (name.strip() and value.strip()):
            raise MoLEError(f"{option} takes name=value, got {pair!r}. Example: {option} {example}")
        found.setdefault(name, []).append(value)
    return found


def read_pictures(option: str, folder: Path) -> list[Image.Image]:
    """All pictures of a folder, in natural order of their names.

    Raises:
        MoLEError: There is no such folder, no picture in it, or one that cannot be read.
    """
    from mole_diffusion import pictures

    try:
        return pictures.read_pictures(folder)
    except MoLEError as error:
        raise MoLEError(f"{option} {error}") from None


@contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """What the library warns of, as the command line says things: one line on standard error."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        typer.echo(f"mole: {' '.join(str(message).split())}", err=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("default", module="mole_diffusion")
        warnings.showwarning = show
        yield
