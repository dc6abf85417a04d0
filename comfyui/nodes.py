"""LoRA with role and trigger, compose, automatic masks, mask in and mask out.

The nodes draw with a diffusers pipeline of their own and not with ComfyUI's sampler: experts hang on modules of models
as diffusers has them. Pictures and masks come out as ComfyUI has them and go on to any node.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from comfy_api.latest import ComfyExtension, io
from PIL import Image

from mole_diffusion.choices import ROLES
from mole_diffusion.composition import COMPOSITIONS, RegionMap
from mole_diffusion.drawing.methods import method
from mole_diffusion.drawing.painted import as_text
from mole_diffusion.drawing.settings import LoRASettings, PictureSettings
from mole_diffusion.errors import MoLEError

CATEGORY = "mole"
BY_ITSELF = "by itself"
Loras = io.Custom("MOLE_LORAS")
Regions = io.Custom("MOLE_REGIONS")
Masks = io.Custom("MOLE_MASKS")

_STUDIO: list[Any] = []


def studio() -> Any:
    """One pipeline for all nodes, made when the first picture is drawn."""
    from mole_diffusion.app.studio import Studio

    if not _STUDIO:
        _STUDIO.append(Studio())
    return _STUDIO[0]


class LoRAWithRole(io.ComfyNode):
    """Adds a LoRA to those that come in."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoLELoRA",
            display_name="LoRA with role and trigger",
            category=CATEGORY,
            description="A LoRA file, the words that call it in the prompt, and whether it is a thing or a style.",
            inputs=[
                io.String.Input("file", tooltip="A .safetensors file, or toybox:cat."),
                io.String.Input("name", default="", tooltip="How regions call it; empty: the file's name."),
                io.Float.Input("strength", default=1.0, min=-4.0, max=4.0, step=0.05),
                io.String.Input("trigger", default="", tooltip="Phrases between commas; empty: what its file says."),
                io.Combo.Input("role", options=list(ROLES), default="subject"),
                Loras.Input("loras", optional=True),
            ],
            outputs=[Loras.Output(display_name="loras")],
        )

    @classmethod
    def execute(
        cls, file: str, name: str, strength: float, trigger: str, role: Any, loras: tuple[LoRASettings, ...] = ()
    ) -> io.NodeOutput:
        from mole_diffusion.app.offered_lora import inspect_offered

        offered = inspect_offered(file.strip(), tuple(lora.name for lora in loras))
        if offered.lora is None:
            raise MoLEError(offered.line.removeprefix("✗ "))
        words = tuple(phrase.strip() for phrase in trigger.split(",") if phrase.strip())
        own = replace(offered.lora, strength=float(strength), role=role, triggers=words or offered.lora.triggers)
        return io.NodeOutput((*loras, replace(own, name=name.strip() or own.name)))


class MaskIn(io.ComfyNode):
    """A mask of ComfyUI as the region of a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoLEMaskIn",
            display_name="Mask in: region of a LoRA",
            category=CATEGORY,
            description="Where a LoRA belongs. LoRAs without a region are found.",
            inputs=[
                io.String.Input("name", tooltip="Of the LoRA."),
                io.Mask.Input("mask"),
                Regions.Input("regions", optional=True),
            ],
            outputs=[Regions.Output(display_name="regions")],
        )

    @classmethod
    def execute(cls, name: str, mask: torch.Tensor, regions: dict[str, tuple[str, ...]] | None = None) -> io.NodeOutput:
        shades = (mask.reshape(-1, *mask.shape[-2:])[0].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        if not shades.any():
            raise MoLEError(f"the mask of {name!r} is empty. Paint where it belongs, or leave the node out.")
        found = dict(regions or {})
        found[name] = (*found.get(name, ()), as_text(Image.fromarray(shades)))
        return io.NodeOutput(found)


class Compose(io.ComfyNode):
    """Draws with several LoRAs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoLECompose",
            display_name="Compose",
            category=CATEGORY,
            description="Draws with several LoRAs at once, each on its own subject.",
            inputs=[
                io.String.Input("base", default="toybox", tooltip="A folder in diffusers' layout, or a Hub id."),
                Loras.Input("loras"),
                io.String.Input("prompt", multiline=True),
                io.String.Input("negative_prompt", multiline=True, default=""),
                io.Combo.Input("composition", options=[BY_ITSELF, *COMPOSITIONS], default=BY_ITSELF),
                io.String.Input("options", default="", tooltip='Of the composition, as JSON: {"own_words": 2}.'),
                io.String.Input("gates", default="", tooltip="Folder or Hub id of gates, for mole."),
                io.Int.Input("width", default=0, min=0, max=4096, step=8, tooltip="0: the base's."),
                io.Int.Input("height", default=0, min=0, max=4096, step=8, tooltip="0: the base's."),
                io.Int.Input("steps", default=30, min=1, max=1000),
                io.Float.Input("guidance_scale", default=7.5, min=0.0, max=50.0, step=0.5),
                io.Int.Input("seed", default=0, min=0, max=2**53, control_after_generate=True),
                Regions.Input("regions", optional=True),
            ],
            outputs=[
                io.Image.Output(display_name="picture"),
                Masks.Output(display_name="masks"),
                io.String.Output(display_name="python"),
            ],
        )

    @classmethod
    def execute(
        cls,
        base: str,
        loras: tuple[LoRASettings, ...],
        prompt: str,
        negative_prompt: str,
        composition: str,
        options: str,
        gates: str,
        width: int,
        height: int,
        steps: int,
        guidance_scale: float,
        seed: int,
        regions: dict[str, tuple[str, ...]] | None = None,
    ) -> io.NodeOutput:
        from mole_diffusion.app.studio import FinishedPicture, Ticket
        from mole_diffusion.drawing.as_python import as_python

        name = None if composition == BY_ITSELF else composition
        given = json.loads(options) if options.strip() else {}
        if name is not None:
            method(name, given)
        wanted = PictureSettings(
            prompt=prompt,
            base=base.strip(),
            loras=tuple(loras),
            gates=gates.strip() or None,
            composition=name,
            composition_options=given,
            regions=regions or {},
            negative_prompt=negative_prompt.strip() or None,
            width=width or None,
            height=height or None,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
        )
        checked = PictureSettings.from_dict(wanted.to_dict())
        drawn = next(event for event in studio().draw([checked], Ticket()) if isinstance(event, FinishedPicture))
        pixels = torch.from_numpy(np.asarray(drawn.picture).astype(np.float32) / 255)[None]
        return io.NodeOutput(pixels, (drawn.masks, drawn.picture.size), as_python(drawn.settings))


class AutomaticMask(io.ComfyNode):
    """Where a LoRA acted, as a mask of ComfyUI."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoLEMaskOut",
            display_name="Automatic masks: mask out",
            category=CATEGORY,
            description="Where a LoRA acted in a composed picture; the method found it, or it was given.",
            inputs=[Masks.Input("masks"), io.String.Input("name", tooltip="Of the LoRA.")],
            outputs=[io.Mask.Output(display_name="mask")],
        )

    @classmethod
    def execute(cls, masks: tuple[RegionMap | None, tuple[int, int]], name: str) -> io.NodeOutput:
        found, (width, height) = masks
        if found is None:
            raise MoLEError("this composition knows no places, so there is no mask. Choose masks, for several LoRAs.")
        if name not in found.names:
            raise MoLEError(f"there is no mask of {name!r}; there are {', '.join(found.names)}.")
        image = found.images((height, width))[name][0]
        return io.NodeOutput(torch.from_numpy(np.asarray(image).astype(np.float32) / 255)[None])


class Nodes(ComfyExtension):
    """What ComfyUI is handed."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes of this folder."""
        return [LoRAWithRole, MaskIn, Compose, AutomaticMask]


async def comfy_entrypoint() -> Nodes:
    """Asked by ComfyUI when it starts."""
    return Nodes()
