"""From settings to pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..pipelines.size import picture_size
from .methods import method
from .opening import read_scheduler
from .painted import as_mask
from .settings import PictureSettings

if TYPE_CHECKING:
    from PIL import Image


def prepare(pipe: Any, settings: PictureSettings) -> None:
    """Brings a pipeline of the right base to what the settings say: LoRAs, gates, composition, scheduler.

    Raises:
        MoLEError: Something of it is refused; LoRAs that were loaded before are off then.
    """
    scheduler = read_scheduler(settings.scheduler)
    pipe.unload_loras()
    pipe.set_composition(None)
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    if settings.loras:
        pipe.load_loras(
            {lora.name: lora.path for lora in settings.loras},
            triggers={lora.name: list(lora.triggers) for lora in settings.loras if lora.triggers},
            roles={lora.name: lora.role for lora in settings.loras},
        )
    if settings.gates is not None:
        pipe.load_gates(settings.gates)
    if settings.composition is not None:
        pipe.set_composition(method(settings.composition, settings.composition_options))


def sized(pipe: Any, settings: PictureSettings) -> PictureSettings:
    """The settings with both sides of the picture: diffusers passes over one without the other."""
    if not (settings.height or settings.width):
        return settings
    height, width = picture_size(pipe, {"height": settings.height, "width": settings.width})
    return replace(settings, height=height, width=width)


def draw(pipe: Any, settings: PictureSettings, on_step_end: Callable[..., Any] | None = None) -> list[Image.Image]:
    """The pictures of one call of a prepared pipeline: `num_images` of them, whatever `index` says.

    Args:
        pipe: From `prepare`.
        settings: The same, `sized`.
        on_step_end: Passed on as `callback_on_step_end`.

    Raises:
        MoLEError: As a call of the pipeline.
    """
    import torch

    regions = {
        name: [as_mask(part) if isinstance(part, str) else part for part in parts]
        for name, parts in settings.regions.items()
    }
    pictures: list[Image.Image] = pipe(
        settings.prompt,
        loras={lora.name: lora.strength for lora in settings.loras if lora.on},
        regions=regions or None,
        negative_prompt=settings.negative_prompt,
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        num_images_per_prompt=settings.num_images,
        generator=[torch.Generator().manual_seed(settings.seed + k) for k in range(settings.num_images)],
        **({} if on_step_end is None else {"callback_on_step_end": on_step_end}),
    ).images
    return pictures
