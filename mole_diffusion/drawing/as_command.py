"""Settings of a picture as the command line that draws it."""

from __future__ import annotations

import json
import shlex

from .settings import TOYBOX, LoRASettings, PictureSettings


def as_command(settings: PictureSettings) -> str:
    """`mole generate …`, quoted for a POSIX shell."""
    words = ["mole", "generate", "--prompt", settings.prompt]
    if settings.base != TOYBOX:
        words += ["--base", settings.base]
    if settings.base_config is not None:
        words += ["--base-config", settings.base_config]
    for lora in settings.loras:
        words += ["--lora", _lora(lora, settings.base)]
        words += [part for phrase in lora.triggers for part in ("--trigger", f"{lora.name}={phrase}")]
        words += ["--role", f"{lora.name}={lora.role}"] if lora.role != "subject" else []
    if not all(lora.on for lora in settings.loras):
        words += ["--only", ",".join(lora.name for lora in settings.loras if lora.on)]
    for name, parts in settings.regions.items():
        for part in parts:
            where = part if isinstance(part, str) else ",".join(repr(number) for number in part)
            words += ["--region", f"{name}={where}"]
    if settings.gates is not None:
        words += ["--gates", settings.gates]
    if settings.composition is not None:
        words += ["--composition", settings.composition]
    for key, value in settings.composition_options.items():
        words += ["--composition-option", f"{key}={json.dumps(value)}"]
    if settings.negative_prompt is not None:
        words += ["--negative-prompt", settings.negative_prompt]
    for option, size in (("--width", settings.width), ("--height", settings.height)):
        words += [] if size is None else [option, str(size)]
    if settings.scheduler is not None:
        words += ["--scheduler", settings.scheduler]
    words += ["--steps", str(settings.steps)]
    if settings.guidance_scale is not None:
        words += ["--guidance-scale", repr(settings.guidance_scale)]
    words += ["--seed", str(settings.seed)]
    if settings.num_images > 1:
        words += ["--num-images", str(settings.num_images)]
    words += ["--device", settings.device, "--dtype", settings.dtype]
    return shlex.join(words)


def _lora(lora: LoRASettings, base: str) -> str:
    strength = "" if lora.strength == 1 else f":{lora.strength!r}"
    if base == TOYBOX and lora.file == f"{TOYBOX}:{lora.name}":
        return lora.name + strength
    return f"{lora.name}={lora.path}{strength}"
