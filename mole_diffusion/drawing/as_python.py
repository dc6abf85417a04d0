"""Settings of a picture as a Python script that draws it."""

from __future__ import annotations

from typing import Any

from ..composition import COMPOSITIONS
from .settings import TOYBOX, LoRASettings, PictureSettings, SavedRegion


def as_python(settings: PictureSettings) -> str:
    """A whole script, which leaves the picture in `image`."""
    imports, needs_toybox = ["import torch"], settings.base == TOYBOX or any(_subject(own) for own in settings.loras)
    painted = any(isinstance(part, str) for parts in settings.regions.values() for part in parts)
    lines: list[str] = []
    base = "toybox.base_dir()" if settings.base == TOYBOX else repr(settings.base)
    config = [] if settings.base_config is None else [f"config={settings.base_config!r}"]
    opened = ", ".join([base, *config, f"dtype=torch.{settings.dtype}"])
    single = settings.base.endswith(".safetensors")
    if single:
        maker = "MoLEStableDiffusionPipeline.from_single_file"
    elif settings.base == TOYBOX:
        maker = "MoLEStableDiffusionPipeline.from_pretrained"
    else:
        maker = f"pipeline_class({base}).from_pretrained"
    lines.append(f"pipe = {maker}({opened}).to({settings.device!r})")
    if settings.scheduler is not None:
        imports.append(f"from diffusers import {settings.scheduler}")
        lines.append(f"pipe.scheduler = {settings.scheduler}.from_config(pipe.scheduler.config)")
    if settings.loras:
        files = ", ".join(f"{lora.name!r}: {_file(lora)}" for lora in settings.loras)
        triggers = {lora.name: list(lora.triggers) for lora in settings.loras if lora.triggers}
        roles = {lora.name: lora.role for lora in settings.loras if lora.role != "subject"}
        given = [f"{{{files}}}"]
        given += [f"triggers={triggers!r}"] if triggers else []
        given += [f"roles={roles!r}"] if roles else []
        lines.append(f"pipe.load_loras({', '.join(given)})")
    if settings.gates is not None:
        lines.append(f"pipe.load_gates({settings.gates!r})")
    if settings.composition is not None:
        if settings.composition_options:
            maker = COMPOSITIONS[settings.composition].__name__
            imports.append(f"from mole_diffusion.composition import {maker}")
            chosen = f"{maker}({', '.join(f'{key}={value!r}' for key, value in settings.composition_options.items())})"
        else:
            chosen = repr(settings.composition)
        lines.append(f"pipe.set_composition({chosen})")
    if painted:
        imports.append("from mole_diffusion.drawing.painted import as_mask")
    named = ["MoLEStableDiffusionPipeline"] if single or settings.base == TOYBOX else []
    if named or needs_toybox:
        imports.append(f"from mole_diffusion import {', '.join([*named, *(['toybox'] if needs_toybox else [])])}")
    if not named:
        imports.append("from mole_diffusion.pipelines import pipeline_class")
    lines += ["images = pipe(", *(f"    {argument}," for argument in _arguments(settings)), ").images"]
    lines.append(f"image = images[{settings.index}]")
    return "\n".join([*sorted(imports, key=lambda line: line.startswith("from mole")), "", *lines]) + "\n"


def _arguments(settings: PictureSettings) -> list[str]:
    chosen = {lora.name: lora.strength for lora in settings.loras if lora.on}
    arguments = [repr(settings.prompt), f"loras={chosen!r}"]
    if settings.regions:
        regions = ", ".join(f"{name!r}: {_regions(parts)}" for name, parts in settings.regions.items())
        arguments.append(f"regions={{{regions}}}")
    optional: dict[str, Any] = {
        "negative_prompt": settings.negative_prompt,
        "height": settings.height,
        "width": settings.width,
        "guidance_scale": settings.guidance_scale,
    }
    arguments += [f"{name}={value!r}" for name, value in optional.items() if value is not None]
    seeds = range(settings.seed, settings.seed + settings.num_images)
    generators = ", ".join(f"torch.Generator().manual_seed({seed})" for seed in seeds)
    return [
        *arguments,
        f"num_inference_steps={settings.steps}",
        *([f"num_images_per_prompt={settings.num_images}"] if settings.num_images > 1 else []),
        f"generator=[{generators}]",
    ]


def _regions(parts: tuple[SavedRegion, ...]) -> str:
    written = [f"as_mask({part!r})" if isinstance(part, str) else repr(part) for part in parts]
    return f"[{', '.join(written)}]"


def _subject(lora: LoRASettings) -> bool:
    return lora.file.startswith(f"{TOYBOX}:")


def _file(lora: LoRASettings) -> str:
    return f"toybox.lora_path({lora.file.removeprefix(f'{TOYBOX}:')!r})" if _subject(lora) else repr(lora.file)
