"""Subjects as gate training wants to know them."""

from __future__ import annotations

from mole_diffusion.training import Concept

from .subjects import Subject, references, subject


def concept(name: str | Subject) -> Concept:
    """The subject's token, class, look in words that CLIP knows, and reference pictures.

    Raises:
        MoLEError: There is no such subject.
    """
    item = subject(name)
    return Concept(
        token=item.token,
        class_name=item.class_name,
        description=f"{item.look} {item.class_name}",
        references=references(name),
    )
