"""Which errors are the user's to mend: said in one line with exit code 2. All others are bugs, with their traceback."""

from __future__ import annotations

from mole_diffusion.errors import LONGEST_MESSAGE, MoLEError, printable

MENDABLE = (MoLEError, OSError)
SOME_FAILED = 1
"""Exit code where the work was done but for some pictures, each of which says why."""


def one_line(error: Exception) -> str:
    """What to say of an error that a user can mend: ours, and what the operating system refuses, such as a full disk.

    Raises:
        Exception: The error itself, if it is neither: an OSError that no system call gave is a bug like any other.
    """
    if not isinstance(error, MoLEError) and getattr(error, "errno", None) is None:
        raise error
    return printable(" ".join(str(error).split()), LONGEST_MESSAGE) or type(error).__name__
