"""The one class of errors that are a user's to mend."""

from __future__ import annotations


class MoLEError(ValueError):
    """Something given to the library is wrong: a file, an argument, a setting.

    Every error that a user can mend is one, so that a program, and the command line, can tell them from a bug of ours
    by one ``except``. The message says what was given, what is allowed and how to mend it, in one line.
    """
