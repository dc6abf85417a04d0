"""Every word the toybox knows, one token each."""

from __future__ import annotations

from .shapes import CLASSES, PATTERNS
from .world import COLORS, GROUNDS

MAX_TOKENS = 52  # six objects with their whole looks
NUM_RARE_TOKENS = 32
RARE_TOKENS = tuple(f"<v{k}>" for k in range(1, NUM_RARE_TOKENS + 1))
_SMALL_WORDS = ("a", "an", "and", "of", "on", "with", "the", "in", "photo", "picture", ",", ".")
WORDS = (*_SMALL_WORDS, *COLORS, *PATTERNS, *CLASSES, *GROUNDS)
