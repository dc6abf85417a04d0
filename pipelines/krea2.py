"""Krea 2."""

from __future__ import annotations

from diffusers import Krea2Pipeline

from .auto import register
from .mixin import MoLEPipelineMixin


class MoLEKrea2Pipeline(MoLEPipelineMixin, Krea2Pipeline):
    """`diffusers.Krea2Pipeline` that draws with several LoRAs at once; see `MoLEPipelineMixin`."""


register("mole-krea2", text_to_image=MoLEKrea2Pipeline)
