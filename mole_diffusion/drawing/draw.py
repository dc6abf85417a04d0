"""From settings to pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import MoLEError
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
    if settings.negative_prompt is not None and "negative_prompt" not in inspect.signature(pipe.__call__).parameters:
        raise MoLEError(f"{type(pipe).__name__} takes no negative prompt. Leave it out.")
    pipe.unload_loras()
    pipe.set_composition(None)
    if scheduler is not None:
        now = type(pipe.scheduler)
        if now is not scheduler and now.__name__.startswith("FlowMatch"):
            raise MoLEError(
                f"--scheduler {settings.scheduler}: {type(pipe).__name__} draws down flow matching's noise levels, "
                f"which this scheduler does not know. Leave --scheduler out: {now.__name__} comes with the base."
            )
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
    """The settings with both sides of the picture: diffusers ignores one without the other.

    Raises:
        MoLEError: A side is no whole number of tokens.
    """
    if not (settings.height or settings.width):
        return settings
    height, width = picture_size(pipe, {"height": settings.height, "width": settings.width})
    pipe.family.refuse_cut(pipe, height, width)
    return replace(settings, height=height, width=width)


def draw(pipe: Any, settings: PictureSettings, on_step_end: Callable[..., Any] | None = None) -> list[Image.Image]:
    """The pictures of one call of a prepared pipeline: `num_images` of them, whatever `index` says.

    Args:
        pipe: The pipeline that `prepare` made ready.
        settings: The settings given to `prepare`, after `sized`.
        on_step_end: Passed on as `callback_on_step_end`.

    Raises:
        MoLEError: As a call of the pipeline.
    """
    import torch

    regions = {
        name: [as_mask(part) if isinstance(part, str) else part for part in parts]
        for name, parts in settings.regions.items()
    }
    # What is not set is the pipeline's own, and not every pipeline knows each of these.
    chosen = {
        name: value
        for name in ("negative_prompt", "height", "width", "guidance_scale")
        if (value := getattr(settings, name)) is not None
    }
    pictures: list[Image.Image] = pipe(
        settings.prompt,
        loras={lora.name: lora.strength for lora in settings.loras if lora.on},
        regions=regions or None,
        num_inference_steps=settings.steps,
        num_images_per_prompt=settings.num_images,
        generator=[torch.Generator().manual_seed(settings.seed + k) for k in range(settings.num_images)],
        **chosen,
        **({} if on_step_end is None else {"callback_on_step_end": on_step_end}),
    ).images
    return pictures
