"""What composing costs: time, memory and loading beside the bare base, peft and merged weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mole_diffusion.lazily import on_first_use

if TYPE_CHECKING:
    from .config import SIDES, SIZES, TARGETS, SpeedConfig
    from .counted import Counted
    from .measure import Speed, measure_speed
    from .page import speed_page
else:
    __getattr__, __dir__ = on_first_use(__name__, "metrics", "measuring speed")

__all__ = ["SIDES", "SIZES", "TARGETS", "Counted", "Speed", "SpeedConfig", "measure_speed", "speed_page"]
