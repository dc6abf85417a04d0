"""The concepts of a benchmark: their LoRAs, words and pictures."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mole_diffusion.errors import MoLEError
from mole_diffusion.files import refuse_alike
from mole_diffusion.pictures import picture_files


@dataclass(frozen=True)
class ConceptFiles:
    """Where one LoRA and pictures of what it draws lie, and what it is called.

    Attributes:
        lora: Its file.
        phrase: What a prompt calls it, its rare token first: "<v1> cat".
        description: What CLIP, which does not know rare words, reads instead, such as "striped orange cat".
        references: Folder with its pictures, or "toybox".
    """

    lora: str
    phrase: str
    description: str
    references: str


def read_concept_files(given: Any) -> dict[str, ConceptFiles]:
    """Reads the concepts of a study by name: those of the toybox, or a mapping of each to the fields of `ConceptFiles`.

    Raises:
        MoLEError: It is something else, a name is none, or a field is missing or unknown.
    """
    if given == "toybox":
        from mole_diffusion import toybox

        return {
            name: ConceptFiles(
                lora=str(toybox.lora_path(name)),
                phrase=f"{toybox.token(name)} {toybox.class_name(name)}",
                description=f"{toybox.subject(name).look} {toybox.class_name(name)}",
                references="toybox",
            )
            for name in toybox.subjects()
        }
    keys = [field.name for field in fields(ConceptFiles)]
    if not isinstance(given, dict) or not given:
        raise MoLEError(f'`concepts` must be "toybox" or a mapping of name to {", ".join(keys)}, got {given!r}.')
    for name, value in given.items():
        if not str(name).strip() or "+" in str(name) or not str(name).isprintable():
            raise MoLEError(f"concept {name!r}: a name is one line without a plus, which joins the names of several.")
        if not isinstance(value, dict) or set(value) != set(keys):
            raise MoLEError(f"concept {name!r} must have exactly {', '.join(keys)}, got {value!r}.")
    refuse_alike(map(str, given), "`concepts`", "Call one of them otherwise.")
    return {str(name): ConceptFiles(**{key: str(value[key]) for key in keys}) for name, value in given.items()}


def lora_file(name: str, concept: ConceptFiles) -> Path:
    """The LoRA of a concept. Raises MoLEError where it is not there."""
    path = Path(concept.lora)
    if not path.is_file():
        raise MoLEError(f"concept {name!r}: there is no LoRA file {path}.")
    return path


def reference_files(name: str, concept: ConceptFiles) -> list[Path]:
    """The pictures of a concept; none where they are the toybox's. Raises MoLEError where there are no such."""
    if concept.references == "toybox":
        return []
    try:
        files = picture_files(concept.references)
    except MoLEError as error:
        raise MoLEError(f"references of concept {name!r}: {error}") from None
    for file in files:
        if not file.is_file():
            raise MoLEError(f"references of concept {name!r}: {file} cannot be read as a picture: it is no file.")
    return files
