"""A prompt as HTML, the words that call a LoRA in its colour."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from ..composition.overlay import colour_of
from ..composition.trigger_words import phrase_pattern

DARK, LIGHT = "#1c1c20", "#ffffff"


def css_colour(index: int) -> str:
    """The colour of a LoRA, the same as on masks laid over pictures."""
    return "#{:02x}{:02x}{:02x}".format(*colour_of(index))


def ink(index: int) -> str:
    """Black or white, whichever is easier to read on that colour."""
    red, green, blue = colour_of(index)
    return DARK if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else LIGHT


def coloured(prompt: str, triggers: Mapping[str, Sequence[str]]) -> str:
    """Marks the phrases of each LoRA; where several overlap, the longest has the words.

    Args:
        prompt: The prompt as it was typed.
        triggers: LoRA to its phrases, in the order of the colours; none for one that takes no part.
    """
    found = [
        (match.start() - match.end(), match.start(), match.end(), index, name)
        for index, (name, phrases) in enumerate(triggers.items())
        for phrase in phrases
        if phrase.strip()
        for match in phrase_pattern(phrase, capitals_count=False).finditer(prompt)
    ]
    kept: list[tuple[int, int, int, str]] = []
    for _, start, end, index, name in sorted(found):
        if all(end <= other[0] or start >= other[1] for other in kept):
            kept.append((start, end, index, name))
    pieces, place = [], 0
    for start, end, index, name in sorted(kept):
        pieces.append(html.escape(prompt[place:start]))
        style = f"background:{css_colour(index)};color:{ink(index)}"
        words = html.escape(prompt[start:end])
        pieces.append(f'<mark style="{style}" title="{html.escape(name, quote=True)}">{words}</mark>')
        place = end
    called = {name for *_, name in kept}
    missing = [name for name, phrases in triggers.items() if phrases and name not in called]
    lacks = f'<p class="mole-lacks">Not called: {html.escape(", ".join(missing))}</p>' if missing else ""
    return f'<p class="mole-prompt">{"".join(pieces)}{html.escape(prompt[place:])}</p>{lacks}'
