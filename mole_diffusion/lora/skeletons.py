"""Which of the published base models a LoRA file may be for, by the names of its modules."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mole_diffusion.families import ARCHITECTURES, FAMILIES
from mole_diffusion.families.skeleton import Skeleton

SKELETONS: tuple[Skeleton, ...] = tuple(skeleton for family in FAMILIES for skeleton in family.skeletons)


def candidates(modules: Iterable[str]) -> list[Skeleton]:
    """The base models that most of a file's names of modules are of; all where the names tell nothing.

    Most, since text encoders are named alike in several.

    Args:
        modules: Names as the file spells them, with dots or underscores.
    """
    names = [module.replace(".", "_") for module in modules]
    counts = [sum(re.search(known.marks, name) is not None for name in names) for known in SKELETONS]
    most = max(counts)
    return [known for known, count in zip(SKELETONS, counts, strict=True) if count == most]


def names_of(modules: Iterable[str]) -> str | None:
    """The base models that a file's names are of, for a message; None where the names tell nothing."""
    found = [known.title for known in candidates(modules)]
    if len(found) == len(SKELETONS):
        return None
    return " or ".join(filter(None, [", ".join(found[:-1]), found[-1]]))


def by_authors(modules: Iterable[str]) -> bool:
    """Whether one of a file's names of modules is that of some model's authors, which diffusers calls otherwise."""
    return any(known.by_authors(module) for module in modules for known in ARCHITECTURES)
