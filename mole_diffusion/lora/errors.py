"""The one error of this room, and how its message is put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mole_diffusion.errors import MoLEError, printable

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
    return LoRAError(f"{printable(source, 300)}{place}: {printable(problem, 500)}{_shown(keys)}. {remedy}")


def _shown(keys: Sequence[str]) -> str:
    if not keys:
        return ""
    rest = len(keys) - SHOWN_KEYS
    shown = [f"'{printable(key, 160)}'" for key in keys[:SHOWN_KEYS]]
    return ": " + ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
