"""What visitors of the page ask for, and how they lose patience."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mole_diffusion.app.studio import Ticket
from mole_diffusion.drawing.settings import LoRASettings, PictureSettings

CAT, BOOT = (
    LoRASettings("cat", "toybox:cat", triggers=("<v1> cat",)),
    LoRASettings("boot", "toybox:boot", triggers=("<v2> boot",)),
)


BOTH = PictureSettings("a <v1> cat and a <v2> boot", loras=(CAT, BOOT), steps=2, guidance_scale=2.0)


def note(events: Iterable[Any], seen: list[Any]) -> None:
    """Keeps what was told before an error."""
    for event in events:
        seen.append(event)


def cancel_after(count: int, events: Iterable[Any], ticket: Ticket, seen: list[Any]) -> None:
    """Iterates; cancels when so many events were seen."""
    for event in events:
        seen.append(event)
        if len(seen) == count:
            ticket.cancel()


class Impatient(Ticket):
    """Cancelled by itself after so many evaluations of the denoiser."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            self.cancel()
        super().check()
