"""The one error of this room, and how its message is put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mole_diffusion.errors import MoLEError

SHOWN_KEYS = 3


class LoRAError(MoLEError):
    """A LoRA that cannot be used as it is: a broken file, an unknown layout, a module it does not fit.

    The message names the file, its layout and component where known, the first offending keys, and a remedy.
    """


def refusal(
    source: str,
    problem: str,
    remedy: str,
    *,
    layout: str | None = None,
    components: Iterable[str] = (),
    keys: Sequence[str] = (),
) -> LoRAError:
    """The `LoRAError` for `problem`, all its parts in one line; the caller raises it.

    Args:
        source: File (or `<state dict>`) it is about.
        problem: What was found and what was expected.
        remedy: What the user can do.
        layout: Key layout of the file, once it is known.
        components: Models the offending keys belong to.
        keys: All offending keys; the first few are shown, the rest counted.
    """
    where = [f"{layout} layout"] if layout else []
    if named := sorted(set(components)):
        where.append(f"component {', '.join(named)}")
    place = f" ({', '.join(where)})" if where else ""
    return LoRAError(f"{source}{place}: {problem}{_shown(keys)}. {remedy}")


def _shown(keys: Sequence[str]) -> str:
    if not keys:
        return ""
    rest = len(keys) - SHOWN_KEYS
    return ": " + ", ".join(repr(key) for key in keys[:SHOWN_KEYS]) + (f" and {rest} more" if rest > 0 else "")
