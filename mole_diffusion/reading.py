"""Reading files that may hold anything: looked at before they are read, and never more than is sensible of them."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from mole_diffusion.errors import MoLEError, printable

LARGEST_TEXT = 16 * 2**20
DEEPEST = 200  # tables and lists within one another


def regular_size(path: str | os.PathLike[str]) -> int:
    """Bytes of a regular file, without opening it: opening a pipe waits for a writer, and a device may never end.

    Raises:
        MoLEError: There is no such file, it cannot be looked at, or it is no regular file. The message starts with
            the problem, for the caller to put the file's name before it.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise MoLEError("no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise MoLEError(f"cannot be opened ({getattr(error, 'strerror', None) or error})") from None
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    kind = next((name for is_kind, name in kinds if is_kind(status.st_mode)), "a device")
    raise MoLEError(f"{kind}, not a file")


def read_text(path: str | os.PathLike[str], largest: int = LARGEST_TEXT) -> str:
    """The text of a regular file in UTF-8, with or without a byte order mark.

    Raises:
        MoLEError: It is no regular file, larger than `largest` bytes, or no text.
    """
    try:
        return regular_text(path, largest)
    except MoLEError as error:
        raise MoLEError(f"{os.fspath(path)}: {error}.") from None


def regular_text(path: str | os.PathLike[str], largest: int = LARGEST_TEXT) -> str:
    """As `read_text`, but the message starts with the problem, for the caller to put the file's name before it."""
    try:
        size = regular_size(path)
        if size > largest:
            raise MoLEError(f"{size:,} bytes, more than the {largest:,} that such a file may have")
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise MoLEError(f"cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise MoLEError("not a text in UTF-8. Save it as UTF-8") from None


def is_text(text: str) -> bool:
    """Whether a string can be written down: half a UTF-16 pair cannot, and no tokenizer takes it.

    JSON and YAML can spell one, and an argument of a command has one for each byte that is no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_deep(found: Any) -> bool:
    level = [found]
    for _ in range(DEEPEST):
        tables = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [inner for table in tables for inner in table]
        if not level:
            return False
    return True


def parse_json(text: str) -> Any:
    """JSON, strictly: no key twice, no NaN or infinity, no nesting that exhausts the interpreter, nothing but text.

    Raises:
        MoLEError: It is no such JSON. The message starts with the problem.
    """

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise MoLEError(f"has the key '{printable(twice, 100)}' twice")
        return found

    def no_constant(name: str) -> Any:
        raise MoLEError(f"has {name}, which is no number")

    try:
        found = json.loads(text, object_pairs_hook=table, parse_constant=no_constant)
        if _is_deep(found):  # Python 3.14 reads that, and what walks through it would fail
            raise RecursionError
        if "\\ud" in text.lower() and not is_text(json.dumps(found, ensure_ascii=False)):
            raise MoLEError("has half a UTF-16 pair, which is no text")
        return found
    except MoLEError as error:
        raise MoLEError(f"is no JSON that can be read: it {error}") from None
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise MoLEError(f"is not JSON ({why})") from None
