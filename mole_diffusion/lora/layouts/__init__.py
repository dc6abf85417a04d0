"""Key layouts: what the keys of a file mean, as `Slot`s, which are the same in all layouts.

A layout is one function, key in, `Slot` out, or `None` where the key is not its own. It needs no model; which module
of a model a slot means is decided in `modules.py`. A new layout is one file here, whose `LAYOUTS` names its function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from mole_diffusion.discovery import modules_in

from .slot import Slot

__all__ = ["LAYOUTS", "Slot", "read_layout"]

LAYOUTS: dict[str, Callable[[str], Slot | None]] = {
    name: layout for module in modules_in(__name__) for name, layout in getattr(module, "LAYOUTS", {}).items()
}
T = TypeVar("T")


def read_layout(state: Mapping[str, T]) -> tuple[str | None, list[tuple[Slot, str, T]], list[str]]:
    """A state dict by slots instead of keys.

    Args:
        state: The file's keys, with anything as values: tensors, or what the header says of them.

    Returns:
        The layout that understands most keys (of two, that whose name comes first: some `.alpha` keys fit several, and
        kohya's of text encoders are the authors' too), `None` where none understands any; what it says of each key,
        beside the key and its value, in the order of the keys; and the keys that it does not understand.
    """
    ordered = sorted(state)
    best: tuple[str | None, dict[str, Slot]] = (None, {})
    for name, layout in LAYOUTS.items():
        slots = {key: slot for key in ordered if (slot := layout(key)) is not None}
        if len(slots) > len(best[1]):
            best = (name, slots)
    layout_name, slots = best
    return (
        layout_name,
        [(slot, key, state[key]) for key, slot in slots.items()],
        [k for k in ordered if k not in slots],
    )
