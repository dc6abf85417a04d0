"""What only training, measuring, the command line or the page need is installed with an extra of the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from .errors import MoLEError

Extra = Literal["train", "metrics", "cli", "app"]
"""As in pyproject.toml; each has those before it in it."""


class MissingPackageError(MoLEError, ImportError):
    """A package that an extra brings is not installed. An ImportError too, for those who try an import."""


@contextmanager
def needs(extra: Extra, what: str) -> Iterator[None]:
    """Around imports that a bare `pip install mole-diffusion` does not bring.

    Args:
        extra: Which brings them.
        what: What needs them, for the message: "training".

    Raises:
        MissingPackageError: One of them is not installed. The message says how to install it.
    """
    try:
        yield
    except MissingPackageError:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == __package__:  # a bug of ours
            raise
        raise MissingPackageError(
            f"{what} needs {package}, which is not installed. Install it: pip install 'mole-diffusion[{extra}]'"
        ) from error
