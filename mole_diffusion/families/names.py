"""Names of modules that do not depend on the version of a library."""

from __future__ import annotations

TEXT_MODEL = "text_model."
COMPILED = "_orig_mod."


def canonical_name(module: str) -> str:
    """A module's name that depends neither on the version of transformers nor on whether a model was compiled.

    That is without the `text_model.` which transformers dropped, and the `_orig_mod.` of `torch.compile`.
    """
    return module.replace(COMPILED, "").removeprefix(TEXT_MODEL)
