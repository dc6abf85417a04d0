"""FLUX.2, dev and klein."""

from __future__ import annotations

from typing import Any

from .auto import register
from .mixin import MoLEPipelineMixin
from .newer import newer

Flux2Pipeline: Any = newer("Flux2Pipeline", since="0.36")
Flux2KleinPipeline: Any = newer("Flux2KleinPipeline", since="0.37")
Flux2KleinInpaintPipeline: Any = newer("Flux2KleinInpaintPipeline", since="0.38")


class MoLEFlux2Pipeline(MoLEPipelineMixin, Flux2Pipeline):
    """`diffusers.Flux2Pipeline` that draws with several LoRAs at once; see `MoLEPipelineMixin`."""


class MoLEFlux2KleinPipeline(MoLEPipelineMixin, Flux2KleinPipeline):
    """`diffusers.Flux2KleinPipeline` that draws with several LoRAs at once; see `MoLEPipelineMixin`."""


class MoLEFlux2KleinInpaintPipeline(MoLEPipelineMixin, Flux2KleinInpaintPipeline):
    """`diffusers.Flux2KleinInpaintPipeline` with several LoRAs at once; see `MoLEPipelineMixin`."""


# Both take pictures to look at, so that one pipeline is for text and for pictures, as in diffusers.
register("mole-flux2", text_to_image=MoLEFlux2Pipeline, image_to_image=MoLEFlux2Pipeline)
register(
    "mole-flux2-klein",
    text_to_image=MoLEFlux2KleinPipeline,
    image_to_image=MoLEFlux2KleinPipeline,
    inpainting=MoLEFlux2KleinInpaintPipeline,
)
