"""Which files of this computer a visitor of the page may name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import MoLEError, printable

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class AllowedFolders:
    """Folders that may be read, and written where a training ends.

    Args:
        folders: What lies below one of these may be named; links are followed before that is asked.

    Raises:
        MoLEError: One of them is no folder.
    """

    def __init__(self, folders: Sequence[str | os.PathLike[str]]) -> None:
        self.folders = tuple(Path(folder).expanduser().resolve() for folder in folders)
        for folder in self.folders:
            if not folder.is_dir():
                raise MoLEError(f"--folder {folder}: there is no such folder. Name one that is there.")

    def path(self, given: str) -> Path:
        """A path that may be named, there or not.

        Raises:
            MoLEError: It lies outside of the folders.
        """
        try:
            path = Path(given.strip()).expanduser()
            found = (path if path.is_absolute() or not self.folders else self.folders[0] / path).resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise MoLEError(f"{printable(given)} is no path: {error}.") from None
        if not any(found.is_relative_to(folder) for folder in self.folders):
            allowed = ", ".join(map(str, self.folders)) or "none"
            raise MoLEError(
                f"{printable(given)} lies outside of the folders that this page may read: {allowed}. Move it there, or "
                "start `mole app` with --folder."
            )
        return found

    def below(self, given: str) -> Path:
        """A folder to write, with a name of its own: what is written beside it stays in the folders too.

        Raises:
            MoLEError: It has no name, or lies outside of the folders.
        """
        if not given.strip():
            raise MoLEError("the folder to write has no name. Write one, such as my-folder.")
        found = self.path(given)
        if found in self.folders:
            raise MoLEError(f"{printable(given)} is the page's own folder. Write the name of one in it: my-folder.")
        return found

    def model(self, given: str) -> str:
        """A base model or gates: "toybox" and Hub ids as they are, else a path that may be named.

        Raises:
            MoLEError: It is empty, or a path outside of the folders.
        """
        given = given.strip()
        if not given:
            raise MoLEError('the base is empty. Write "toybox", a folder, a .safetensors file or a Hub id.')
        if given == "toybox":
            return given
        try:
            return str(self.path(given)) if not HUB_ID.fullmatch(given) or self.path(given).exists() else given
        except MoLEError:
            if HUB_ID.fullmatch(given) and not Path(given).exists():
                return given
            raise
