"""Which errors are the user's to mend: said in one line with exit code 2. All others are bugs, with their traceback."""

from __future__ import annotations

from mole_diffusion.errors import LONGEST_MESSAGE, MoLEError, printable

MENDABLE = (MoLEError, OSError, MemoryError, RuntimeError)
SOME_FAILED = 1
"""Exit code where the work was done but for some pictures, each of which says why."""
_NO_MEMORY = ("out of memory", "can't allocate memory", "Invalid buffer size")  # as torch says it on its devices


def one_line(error: Exception) -> str:
    """What to say of an error that a user can mend: ours, and what the system refuses: a full disk, more memory.

    Raises:
        Exception: The error itself, if it is neither: an OSError that no system call gave is a bug like any other.
    """
    if isinstance(error, MemoryError | RuntimeError):
        said = str(error)
        if not (isinstance(error, MemoryError) or any(words in said for words in _NO_MEMORY)):
            raise error
        what = next((line for line in said.splitlines() if any(words in line for words in _NO_MEMORY)), said)
        return printable(
            f"there is not enough memory. Take smaller pictures, fewer at a time, or a lower --dtype. ({what.strip()})"
        )
    if not isinstance(error, MoLEError) and getattr(error, "errno", None) is None:
        raise error
    return printable(" ".join(str(error).split()), LONGEST_MESSAGE) or type(error).__name__
