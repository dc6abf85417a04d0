"""The one class of errors that are a user's to mend, and how their messages stay safe to show."""

from __future__ import annotations

import re

LONGEST_MESSAGE = 2000


class MoLEError(ValueError):
    """Something given to the library is wrong: a file, an argument, a setting.

    Every error that a user can mend is one, so that a program, and the command line, can tell them from a bug of ours
    by one `except`. The message says what was given, what is allowed and how to mend it, in one line. It may quote
    what a file holds: control characters are shown as escapes, and what is very long is cut in its middle.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(re.sub(r"\s*[\r\n]\s*", " ", str(message).strip()), LONGEST_MESSAGE))


def printable(text: str, longest: int = 200) -> str:
    """`text` as a terminal may show it: nothing in it acts on the terminal, and it is at most `longest` characters.

    Names come from files that anybody may have written: an escape sequence could rewrite what stands on the screen.
    Of a long text, the beginning and the end stay.
    """
    if len(text) > longest:  # before the escapes are written: a name may have millions of characters
        half = (longest - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"
