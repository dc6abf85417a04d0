"""What stands in the page's fields, as settings of a picture, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..drawing.methods import method
from ..drawing.settings import TOYBOX, LoRASettings, PictureSettings
from ..errors import MoLEError
from ..yaml_files import parse_yaml
from . import drawn_regions
from .allowed_folders import AllowedFolders
from .offered_lora import inspect_offered

MOST_LORAS = 8
MOST_SEEDS = 8
LARGEST_SIDE = 2048
MOST_STEPS = 200
LONGEST_PROMPT = 4000  # characters; no text encoder reads as many
BY_ITSELF = "by itself"
"""Instead of a composition's name: the pipeline chooses."""


@dataclass(frozen=True)
class PageFields:
    """The fields of the page, as they are typed."""

    base: str
    loras: Sequence[LoRASettings]
    prompt: str
    negative_prompt: str
    composition: str
    options: str
    gates: str
    width: float | None
    height: float | None
    steps: float
    guidance_scale: float | None
    scheduler: str
    seed: float
    count: float
    regions: str


def read(form: PageFields, allowed: AllowedFolders) -> list[PictureSettings]:
    """Settings of every picture that is asked for: one for each seed.

    Raises:
        MoLEError: A field cannot be.
    """
    if not form.prompt.strip():
        raise MoLEError("the prompt is empty. Say what to draw, with the words that call the LoRAs.")
    for what, text in (("prompt", form.prompt), ("negative prompt", form.negative_prompt)):
        if len(text) > LONGEST_PROMPT:
            raise MoLEError(f"the {what} has {len(text):,} characters; write {LONGEST_PROMPT:,} at most.")
    name = None if form.composition == BY_ITSELF else form.composition
    options = read_options(form.options)
    if options and name is None:
        raise MoLEError("options belong to a composition. Choose one by name, or leave the options empty.")
    if name is not None:
        method(name, options)
    on = [lora.name for lora in form.loras if lora.on]
    given = PictureSettings(
        prompt=form.prompt.strip(),
        base=allowed.model(form.base),
        loras=tuple(form.loras),
        gates=allowed.model(form.gates) if form.gates.strip() else None,
        composition=name,
        composition_options=options,
        regions={key: tuple(parts) for key, parts in drawn_regions.read(form.regions, on).items()},
        negative_prompt=form.negative_prompt.strip() or None,
        width=_side("width", form.width),
        height=_side("height", form.height),
        steps=whole("the number of steps", form.steps, 1, MOST_STEPS),
        scheduler=form.scheduler.strip() or None,
        guidance_scale=None if form.guidance_scale is None else float(form.guidance_scale),
        seed=whole("the seed", form.seed, 0, 2**53),
    )
    count = whole("the number of seeds", form.count, 1, MOST_SEEDS)
    checked = PictureSettings.from_dict(given.to_dict())  # which says what is wrong with a number or a name
    return [replace(checked, seed=checked.seed + index) for index in range(count)]


def read_options(text: str) -> dict[str, Any]:
    """Options of a composition from "own_words=2, smoothing=5".

    Raises:
        MoLEError: A part of it is not so.
    """
    found: dict[str, Any] = {}
    for part in text.replace("\n", ",").split(","):
        key, equals, value = part.partition("=")
        if not part.strip():
            continue
        if not (equals and key.strip() and value.strip()):
            raise MoLEError(f"an option is written own_words=2, got {part.strip()!r}.")
        found[key.strip()] = parse_yaml(value)
    return found


def write_options(options: dict[str, Any]) -> str:
    """What `read_options` reads as these."""
    return ", ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()
    )


def find_again(
    settings: PictureSettings, dropped: Sequence[LoRASettings], allowed: AllowedFolders
) -> list[tuple[LoRASettings, str]]:
    """The LoRAs of settings from elsewhere, each with a line that says what became of it.

    One whose bytes were dropped on the page is taken, wherever it lay when the picture was drawn.

    Args:
        settings: The settings of a picture.
        dropped: What lies on the page.
        allowed: What else may be read.
    """
    by_hash = {lora.sha256: lora.file for lora in dropped if lora.sha256}
    found = []
    for lora in settings.loras[:MOST_LORAS]:
        file = by_hash.get(lora.sha256, lora.file)
        if file == lora.file and not file.startswith(f"{TOYBOX}:"):
            try:
                file = str(allowed.path(file))
            except MoLEError as error:
                found.append((replace(lora, on=False), f"✗ drop {Path(lora.file).name} on the page again: {error}"))
                continue
        offered = inspect_offered(file)
        same = offered.lora is None or not lora.sha256 or offered.lora.sha256 == lora.sha256
        line = offered.line if same else "✗ this file has changed since the picture was drawn. " + offered.line
        found.append((replace(lora, file=file, on=lora.on and offered.lora is not None and same), line))
    return found


def _side(name: str, given: float | None) -> int | None:
    if not given:
        return None
    side = whole(f"the {name}", given, 8, LARGEST_SIDE)
    if side % 8:
        raise MoLEError(f"the {name} must be a multiple of 8, such as {max(8, side // 8 * 8)}, got {side}.")
    return side


def whole(what: str, given: float | None, smallest: int, largest: int) -> int:
    """A whole number in its range.

    Raises:
        MoLEError: It is none.
    """
    if given is None or given != int(given) or not smallest <= given <= largest:
        raise MoLEError(f"{what} must be a whole number from {smallest} to {largest}, got {given}.")
    return int(given)
