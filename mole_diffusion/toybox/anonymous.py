"""Anonymous subjects: other things than the twelve with names, for methods to be tried on what nothing was tuned on."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from mole_diffusion.errors import MoLEError
from mole_diffusion.reading import parse_json, regular_text

from .shapes import CLASSES
from .subjects import SUBJECTS, Subject
from .vocabulary import RARE_TOKENS
from .world import Look, random_look

SUBJECT_FILE, LORA_FILE = "subject.json", "lora.safetensors"
_FREE_TOKENS = RARE_TOKENS[len(SUBJECTS) :]


class AnonymousSubjectsError(MoLEError):
    """There are no anonymous subjects where they were looked for, or no such number of them can be made."""


def draw_anonymous(count: int, seed: int = 0) -> list[Subject]:
    """Seeded subjects whose looks no other subject wears.

    All sixteen classes take part in turn, so the first sixteen stand together in any choice. Subjects of one class have
    one token, which no subject with a name has: things of a scene differ in class, so they never meet.

    Raises:
        AnonymousSubjectsError: `count` is less than 1 or more than there are looks to give away.
    """
    most = 8 * 7 * 3 - len(SUBJECTS)
    if not 1 <= count <= most:
        raise AnonymousSubjectsError(f"count must be 1 to {most}, as many as there are looks, got {count}.")
    rng = np.random.default_rng([7, seed])
    order = [str(name) for name in rng.permutation(CLASSES)]
    taken = {item.look for item in SUBJECTS.values()}
    drawn = []
    for k in range(count):
        look = random_look(rng)
        while look in taken:
            look = random_look(rng)
        taken.add(look)
        name = order[k % len(order)]
        token = _FREE_TOKENS[CLASSES.index(name)]
        drawn.append(Subject(f"{name}-{k // len(order) + 1}", name, look, token, 1000 * (seed + 1) + k))
    return drawn


def anonymous_subjects(folder: str | os.PathLike[str]) -> dict[str, tuple[Subject, Path]]:
    """The subjects that `mole toybox anonymous --out FOLDER` made, each with its LoRA file, by name.

    A subject may stand wherever the name of one may: `toybox.subject_prompt([subject, "cat"], "snow")`,
    `toybox.Oracle()(image, [subject])`, `toybox.references(subject)`, `toybox.concept(subject)`.

    Raises:
        AnonymousSubjectsError: No finished subject lies there, one is damaged, or two have one name.
    """
    found: dict[str, tuple[Subject, Path]] = {}
    read = [(read_subject(file), file.parent) for file in sorted(Path(folder).glob(f"*/{SUBJECT_FILE}"))]
    for item, place in sorted(read, key=lambda one: one[0].seed):
        if item.name in found:
            raise AnonymousSubjectsError(
                f"{place} and {found[item.name][1].parent} both hold the subject {item.name!r}. Take one of them away."
            )
        found[item.name] = (item, place / LORA_FILE)
    if not found:
        raise AnonymousSubjectsError(
            f"no anonymous subject lies in {folder}; make some with `mole toybox anonymous --out {folder}`."
        )
    return found


def read_subject(file: Path) -> Subject:
    """A subject from its `subject.json`.

    Raises:
        AnonymousSubjectsError: The file is damaged, or of something else.
    """
    kinds = {"name": str, "class_name": str, "look": dict, "token": str, "seed": int}
    try:
        entries = parse_json(regular_text(file))
        if not isinstance(entries, dict) or {name: type(value) for name, value in entries.items()} != kinds:
            raise MoLEError(f"no object with {', '.join(kinds)}, and of their kinds")
        parts, look = {field.name for field in dataclasses.fields(Look)}, entries["look"]
        if set(look) != parts or not all(isinstance(value, str) for value in look.values()):
            raise MoLEError(f"`look` is not of {', '.join(sorted(parts))}")
        if entries["class_name"] not in CLASSES:
            raise MoLEError(f"there is no class {entries['class_name']!r}")
        return Subject(**{**entries, "look": Look(**look)})
    except MoLEError as error:
        raise AnonymousSubjectsError(
            f"{file} is no subject: {str(error).rstrip('.')}. Delete {file.parent}, and make it anew with "
            "`mole toybox anonymous`."
        ) from None


def subject_entries(item: Subject) -> dict[str, object]:
    """The content of its `subject.json`."""
    return dataclasses.asdict(item)
