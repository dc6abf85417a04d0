"""What composing costs: time, memory and loading beside the bare base, peft and merged weights."""

from __future__ import annotations

from .config import SIDES, SIZES, TARGETS, SpeedConfig
from .counted import Counted
from .measure import Speed, measure_speed
from .page import speed_page

__all__ = ["SIDES", "SIZES", "TARGETS", "Counted", "Speed", "SpeedConfig", "measure_speed", "speed_page"]
