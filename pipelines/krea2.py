"""Krea 2."""

from __future__ import annotations

from typing import Any

from .auto import register
from .mixin import MoLEPipelineMixin
from .newer import newer

Krea2Pipeline: Any = newer("Krea2Pipeline", since="0.39")


class MoLEKrea2Pipeline(MoLEPipelineMixin, Krea2Pipeline):
    """`diffusers.Krea2Pipeline` that draws with several LoRAs at once; see `MoLEPipelineMixin`."""


register("mole-krea2", text_to_image=MoLEKrea2Pipeline)
