"""What the page says of a job, as HTML: how far it is, and what went wrong, in the library's one line."""

from __future__ import annotations

import html

from ..errors import MoLEError, printable
from .studio import Cancelled, Progress


def progress(now: Progress) -> str:
    """A line and a bar."""
    left = "" if now.left is None or now.done >= 1 else f", {_duration(now.left)} left"
    percent = round(100 * min(1.0, max(0.0, now.done)))
    return (
        f'<div class="mole-said" role="status">{html.escape(now.doing)}: {percent} %{left}'
        f'<div class="mole-bar" role="progressbar" aria-valuenow="{percent}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-label="{html.escape(now.doing, quote=True)}"><div style="width:{percent}%"></div></div></div>'
    )


def done(text: str) -> str:
    """A line that says what is done."""
    return f'<div class="mole-said" role="status">{html.escape(text)}</div>'


def wrong(error: BaseException) -> str:
    """What went wrong, where a visitor can mend it.

    Raises:
        BaseException: The error itself, if it is a bug: it belongs into the log with its traceback.
    """
    if isinstance(error, Cancelled):
        return done("Cancelled.")
    if not isinstance(error, MoLEError):
        raise error
    return f'<div class="mole-said mole-wrong" role="alert">{html.escape(printable(str(error), 2000))}</div>'


def _duration(seconds: float) -> str:
    whole = max(1, round(seconds))
    return f"{whole} s" if whole < 90 else f"{round(whole / 60)} min"
