"""Names of modules that do not depend on the version of a library."""

from __future__ import annotations

TEXT_MODEL = "text_model."


def canonical_name(module: str) -> str:
    """A module's name that does not depend on the version of transformers: without the `text_model.` it dropped."""
    return module.removeprefix(TEXT_MODEL)
