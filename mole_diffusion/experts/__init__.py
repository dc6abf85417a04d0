"""N LoRAs as one stacked map: the arithmetic, and how it hangs on a model."""

from __future__ import annotations

from .experts import Experts
from .processor import MoLEAttnProcessor
from .refusals import AttachError
from .run import Run, Weigher, in_backward
from .site import Projections, Site, SiteGroup
from .stack import ExpertStack

__all__ = [
    "AttachError",
    "ExpertStack",
    "Experts",
    "MoLEAttnProcessor",
    "Projections",
    "Run",
    "Site",
    "SiteGroup",
    "Weigher",
    "in_backward",
]
