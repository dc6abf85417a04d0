"""What is seen of wrong arguments before torch and diffusers are imported, which takes seconds."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from mole_diffusion.clip_names import open_clip_name
from mole_diffusion.errors import MoLEError


def refuse_missing_loras(files: Mapping[str, str]) -> None:
    """Raises MoLEError where nothing is at the path of a LoRA.

    Args:
        files: Name to path.
    """
    for name, file in files.items():
        if not _is_there(file):
            raise MoLEError(
                f"--lora {name}={file}: no such file. Check the path; a LoRA on the Hub is fetched with "
                "`hf download <repository>` first."
            )


def refuse_missing(option: str, paths: Iterable[str | os.PathLike[str]]) -> None:
    """Raises MoLEError where nothing is at a path that an option was given."""
    for path in paths:
        if not _is_there(path):
            raise MoLEError(f"{option} {os.fspath(path)}: there is no such file or folder. Check the path.")


def refuse_missing_clip(clip: str) -> None:
    """Raises MoLEError for a CLIP that is named by a path where no folder is."""
    path = os.path.expanduser(clip)
    if (os.path.isabs(path) or path.startswith(".")) and not os.path.isdir(path):
        raise MoLEError(f"--clip {clip}: there is no such folder. Give one in open_clip's format, or an architecture.")


def refuse_unknown_clip(clip: str, pretrained: str | None) -> None:
    """Raises MoLEError for a folder that is no CLIP, and for an architecture or weights that open_clip has not."""
    try:
        open_clip_name(clip, pretrained)
    except MoLEError as error:
        raise MoLEError(f"--clip: {error}") from None


def refuse_other(option: str, given: str, known: Iterable[str]) -> None:
    """Raises MoLEError for a word that is none of those that an option takes."""
    if given not in known:
        raise MoLEError(f"{option} {given}: must be one of {', '.join(known)}.")


def refuse_no_rate(option: str, rate: float | None) -> None:
    """Raises MoLEError for a learning rate that nothing is learnt with: 0 or less, or no finite number."""
    if rate is not None and not 0 < rate < math.inf:
        raise MoLEError(f"{option} {rate}: must be positive and finite, such as 1e-3.")


def _is_there(path: str | os.PathLike[str]) -> bool:
    try:
        return os.path.lexists(Path(path))
    except ValueError:  # no name of a file; whoever reads it says so
        return True
