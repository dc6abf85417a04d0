"""Loading models that other libraries read: safetensors only, and one error for whatever they fall over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mole_diffusion.errors import MoLEError, printable


class LoadingError(MoLEError, OSError):
    """A model that cannot be loaded. An OSError too, as which diffusers and transformers raise most of these."""


FOLDER = (
    "Give a folder as save_pretrained writes it, with weights in .safetensors (pickles are not read), or the name of "
    "one on the Hub, which can be reached."
)


@contextmanager
def loading(what: str, remedy: str = FOLDER) -> Iterator[None]:
    """A `with` block for a call of another library that reads somebody's folder, which may hold anything.

    Args:
        what: What is loaded, for the message: "the base model ./sd".
        remedy: What to give instead.

    Raises:
        LoadingError: The library failed; the message has the first words of what it said.
    """
    try:
        yield
    except MoLEError:
        raise
    except Exception as error:  # damaged JSON, weights or tokenizers end in some ten kinds of errors there
        said = printable(" ".join(str(error).split()), 500) or type(error).__name__
        raise LoadingError(f"{what} cannot be loaded: {said} {remedy}") from error
