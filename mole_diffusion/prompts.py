"""The one reader of files with prompts, whatever editor or shell wrote them."""

from __future__ import annotations

import codecs
import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import MoLEError
from .reading import regular_size

_MARKS = (  # longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_TABLES = (".csv", ".tsv", ".jsonl", ".yaml", ".yml", ".xml", ".html", ".xlsx", ".docx", ".rtf")
_MOST_BYTES = 64 * 2**20


def read_prompt_text(file: str | os.PathLike[str]) -> str:
    """The text of a file: UTF-8, or what its byte order mark says.

    Raises:
        MoLEError: There is no such file, it is too large for text, or it is in another encoding.
    """
    path = Path(file)
    try:
        size = regular_size(path)
    except MoLEError as error:
        raise MoLEError(f"{path}: {error}.") from None
    try:
        if size > _MOST_BYTES:
            raise MoLEError(f"{path} is larger than {_MOST_BYTES // 2**20} MiB, which is no list of prompts.")
        data = path.read_bytes()
    except OSError as error:
        raise MoLEError(f"{path} cannot be read: {error.strerror or error}.") from None
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise MoLEError(
            f"{path} is not {encoding.removesuffix('-sig').upper()} (line {line}). Save it as UTF-8."
        ) from None
    text = text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")
    odd = _no_letter(text)
    if odd is not None:
        line = text[: text.index(odd)].count("\n") + 1
        raise MoLEError(
            f"{path} has the control character {odd!r} in line {line}, so it is no plain text, or UTF-16 without a "
            "byte order mark. Save it as UTF-8."
        )
    return text


def read_prompt_lines(file: str | os.PathLike[str]) -> list[str]:
    """The prompts of a text file, a line each; empty lines are left out.

    Raises:
        MoLEError: As `read_prompt_text`, or it is a table by its ending.
    """
    path = Path(file)
    if path.suffix.lower() in _TABLES:
        raise MoLEError(
            f"{path}: prompts are read from a text file with a prompt a line, or from .json, not from {path.suffix}."
        )
    return [line.strip() for line in read_prompt_text(path).split("\n") if line.strip()]


def read_prompts(file: str | os.PathLike[str], names: Sequence[str]) -> list[str]:
    """A prompt for each picture, from a text or JSON file.

    Args:
        file: A prompt a line, in the order of the pictures; or one line for all; or, in `.json`, an object of the
            pictures' names to prompts.
        names: Names of the pictures.

    Raises:
        MoLEError: As `read_prompt_text`; or there are not as many prompts as pictures, or a picture has none.
    """
    path = Path(file)
    if path.suffix.lower() == ".json":
        by_name = _read_json(path)
        # A Mac writes "é" in file names as two signs, editors as one.
        missing = [name for name in names if _composed(name) not in by_name]
        if missing:
            raise MoLEError(f"{path} has no prompt for {len(missing)} of {len(names)} pictures: {missing[0]} …")
        return [by_name[_composed(name)] for name in names]
    prompts = read_prompt_lines(path)
    if len(prompts) == 1:
        prompts *= len(names)
    if len(prompts) != len(names):
        raise MoLEError(
            f"{path} has {len(prompts)} prompts, and there are {len(names)} pictures. Give one line for each, in the "
            "order of their names (2.png before 10.png), one line for all, or a JSON file of names to prompts."
        )
    return prompts


def _read_json(path: Path) -> dict[str, str]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if _composed(name) in found:
                raise MoLEError(f"{path} has {name!r} twice. Give each picture one prompt.")
            found[_composed(name)] = value
        return found

    text = read_prompt_text(path)
    try:
        by_name = json.loads(text, object_pairs_hook=once)
    except MoLEError:
        raise
    except (ValueError, RecursionError) as error:
        raise MoLEError(f"{path} is no JSON: {error}.") from None
    for name, prompt in by_name.items() if isinstance(by_name, dict) else ():
        if isinstance(prompt, str) and (odd := _no_letter(prompt)) is not None:
            raise MoLEError(f"{path}: the prompt of {name!r} has {odd!r}, which is no letter. Take it out.")
    if not isinstance(by_name, dict) or not all(isinstance(p, str) and p.strip() for p in by_name.values()):
        raise MoLEError(f'{path} must hold an object of picture names to prompts, {{"0.png": "a cat", …}}.')
    return by_name


def _no_letter(text: str) -> str | None:
    """The first control character, or half of a UTF-16 pair."""
    return next((sign for sign in text if unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\t"), None)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
