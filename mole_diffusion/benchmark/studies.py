"""The studies that come along, by their names."""

from __future__ import annotations

from pathlib import Path

from mole_diffusion.errors import MoLEError

# In a checkout they lie in a folder of their own beside the package; a wheel has that folder inside of this room.
_FOLDERS = (Path(__file__).with_name("shipped"), Path(__file__).resolve().parents[2] / "benchmarks")


def find_study(given: str | Path) -> Path:
    """The file of a study: a path as it is, or one that comes along by its name, such as "table1".

    Raises:
        MoLEError: There is neither.
    """
    path = Path(given)
    if path.suffix or path.is_file():
        return path
    found = {file.stem: file for folder in _FOLDERS for file in sorted(folder.glob("*.yaml"))}
    if str(given) not in found:
        what = "a folder and no file" if path.is_dir() else "no such file"
        raise MoLEError(f"{given}: {what}, and no study of that name comes along; there are {', '.join(found)}.")
    return found[str(given)]
