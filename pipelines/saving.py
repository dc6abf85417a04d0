"""What an earlier save left in a folder, and would be read instead of what is there now."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_SHARD = re.compile(r"-\d{5}-of-\d{5}")


def remove_older_weights(folder: Path, written: Iterable[Path]) -> None:
    """Takes away weights that were saved in other parts than now, with the table of these parts.

    Libraries look for such a table first. Weights of another variant stay.

    Args:
        folder: Where a pipeline was saved.
        written: The files that belong there now, relative to it.
    """
    now = {folder / file for file in written}
    for file in now:
        kind = _weights(file.name)
        for other in file.parent.iterdir() if kind else ():
            if other not in now and _weights(other.name) == kind:
                other.unlink()


def _weights(name: str) -> frozenset[str]:
    """What is the same in the names of all files that hold one model's weights of one variant; empty of others."""
    parts = frozenset(_SHARD.sub("", name).split("."))
    return parts - {"index", "json"} if parts & {"safetensors", "bin"} else frozenset()
