"""Numbers that take long to measure, written down one by one until all of them are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mole_diffusion.errors import MoLEError
from mole_diffusion.files import write_json
from mole_diffusion.reading import parse_json, read_text


class KeptNumbers:
    """So that a measuring that was ended goes on where it was.

    Args:
        path: The file they lie in. Whoever has written down the whole removes it.
        made_of: What they are measured on, and how. Those of anything else are measured again, as are those of a file
            that cannot be read.
    """

    def __init__(self, path: Path, made_of: Mapping[str, Any]) -> None:
        self._path = path
        self._made_of = dict(made_of)
        self._numbers: dict[str, Any] = {}
        if path.is_file():
            try:
                found = parse_json(read_text(path))
            except MoLEError:
                found = None
            if isinstance(found, dict) and found.get("made of") == self._made_of:
                numbers = found.get("numbers")
                self._numbers = dict(numbers) if isinstance(numbers, dict) else {}

    def get(self, name: str, measure: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The number of that name, or several as JSON has them; measured with these arguments if it is not there."""
        if name not in self._numbers:
            self._numbers[name] = measure(*args, **kwargs)
            write_json(self._path, {"made of": self._made_of, "numbers": self._numbers})
        return self._numbers[name]
