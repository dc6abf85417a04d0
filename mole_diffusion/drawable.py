"""Numbers that a picture can be drawn with: finite, and not so large that it would be black."""

from __future__ import annotations

from typing import Any

from .errors import MoLEError

# Beyond it activations overflow, and the picture is black.
LARGEST_NUMBER = 1e6


def is_drawable(number: Any) -> bool:
    """Whether a number that multiplies is finite and not so large that the picture would be black."""
    return bool(-LARGEST_NUMBER <= number <= LARGEST_NUMBER)  # which NaN is not, nor a whole number beyond all floats


def check_drawable(name: str, number: Any, hint: str = "") -> None:
    """Raises MoLEError, which begins with `name` and ends with the hint, unless a number is drawable."""
    if not is_drawable(number):
        more = f" {hint}" if hint else ""
        raise MoLEError(f"{name} must be finite, and at most {LARGEST_NUMBER:g}, got {number}.{more}")
