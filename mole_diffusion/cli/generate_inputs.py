"""What `mole generate` reads from the command line. Everything is checked before a model is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.errors import MoLEError, printable

from .inputs import read_pairs, read_several

if TYPE_CHECKING:
    from mole_diffusion.composition import Composition, Role
    from mole_diffusion.drawing.settings import Region

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
WEBUI_LORA = re.compile(r"<(?:lora|lyco):[^>]*>", re.IGNORECASE)


def read_prompt(prompt: str) -> str:
    """The prompt.

    Raises:
        MoLEError: It is empty, or asks for a LoRA as the WebUI of Automatic1111 does, which would be read as words.
    """
    if not prompt.strip():
        raise MoLEError('--prompt is empty. Say what to draw: --prompt "a photo of a cat on grass".')
    found = WEBUI_LORA.search(prompt)
    if found:
        raise MoLEError(
            f"--prompt has {found.group()}, which would be read as words here. Take it out, and give the LoRA and its "
            "strength as --lora cat=cat.safetensors:0.8."
        )
    return prompt


def read_loras(entries: Sequence[str], *, with_toybox: bool) -> tuple[dict[str, str], dict[str, float]]:
    """The file and the strength of each LoRA, from entries such as "cat=cat.safetensors:0.8".

    Only a number after the last colon is a strength, so that C:\\cat.safetensors is a file.

    Args:
        entries: Of the command line.
        with_toybox: Whether a subject of the toybox may stand there by its name alone, "cat" or "cat:0.8".

    Raises:
        MoLEError: An entry has no name or no file, a name comes twice, or a strength is not finite.
    """
    if with_toybox:
        from mole_diffusion import toybox

        bare = re.compile(rf"({'|'.join(toybox.subjects())})(:{NUMBER})?")
        matches = [bare.fullmatch(entry) for entry in entries]
        entries = [
            f"{match[1]}={toybox.lora_path(match[1])}{match[2] or ''}" if match else entry
            for match, entry in zip(matches, entries, strict=True)
        ]
    files: dict[str, str] = {}
    strengths: dict[str, float] = {}
    for name, given in read_pairs("--lora", entries, "cat=cat.safetensors or cat=cat.safetensors:0.8").items():
        file, _, last = given.rpartition(":")
        has_strength = bool(file) and re.fullmatch(NUMBER, last) is not None
        files[name] = file if has_strength else given
        strengths[name] = float(last) if has_strength else 1.0
        if not math.isfinite(strengths[name]):
            raise MoLEError(f"--lora {name}={given}: the strength must be finite, such as 0.8, got {last}.")
    return files, strengths


def toybox_name(file: str) -> str | None:
    """How settings name the LoRA of a toybox subject, "toybox:cat", wherever the package lies; `None` for others."""
    from mole_diffusion import toybox

    known = {str(toybox.lora_path(name)): f"toybox:{name}" for name in toybox.subjects()}
    return known.get(file)


def read_chosen(only: str | None, strengths: Mapping[str, float]) -> dict[str, float]:
    """The `loras` of a call: the LoRAs that --only keeps, with their strengths.

    Raises:
        MoLEError: It names a LoRA that is not there, or one twice.
    """
    if only is None:
        return dict(strengths)
    from mole_diffusion.pipelines.selection import check_names

    names = [name.strip() for name in only.split(",") if name.strip()]
    check_names(names, list(strengths), "--only")
    return {name: strengths[name] for name in names}


def read_triggers(entries: Sequence[str], names: Collection[str]) -> dict[str, list[str]]:
    """The words that call each LoRA; several for a LoRA that has several entries.

    Raises:
        MoLEError: An entry is malformed or names no LoRA.
    """
    triggers = read_several("--trigger", entries, 'cat="<v1> cat"')
    _check_known("--trigger", triggers, names)
    return triggers


def read_roles(entries: Sequence[str], names: Collection[str]) -> dict[str, Role]:
    """The role of each LoRA that has an entry.

    Raises:
        MoLEError: An entry is malformed, names no LoRA, or the role is unknown.
    """
    from mole_diffusion.composition.call import ROLES

    roles = read_pairs("--role", entries, "ink=style")
    _check_known("--role", roles, names)
    for name, role in roles.items():
        if role not in ROLES:
            raise MoLEError(f"--role {name}={role}: a role is one of {', '.join(ROLES)}.")
    return roles  # type: ignore[return-value]


def read_regions(
    entries: Sequence[str], names: Collection[str], height: int | None, width: int | None
) -> dict[str, tuple[Region, ...]] | None:
    """Where each LoRA belongs: boxes "cat=0,0,0.5,1" and painted pictures "cat=mask.png"; `None` without any.

    Args:
        entries: Of the command line.
        names: The LoRAs.
        height: Of the picture to draw, where it was said.
        width: Likewise.

    Raises:
        MoLEError: An entry is malformed, names no LoRA, is an empty or reversed box, or a file that is no picture.
    """
    regions = read_several("--region", entries, "cat=0,0,0.5,1")
    _check_known("--region", regions, names)
    read = {name: tuple(_region(name, text, height, width) for text in texts) for name, texts in regions.items()}
    return read or None


def _region(name: str, text: str, height: int | None, width: int | None) -> Region:
    numbers = re.fullmatch(rf"\s*{NUMBER}\s*(?:,\s*{NUMBER}\s*)*", text)
    region: Any = tuple(float(number) for number in text.split(",")) if numbers else _painted(name, text)
    from mole_diffusion.composition.region_forms import draw
    from mole_diffusion.drawing.painted import as_text

    # Where the size of the picture is the base's, which nobody knows yet, it is taken to be large enough for the box.
    right, bottom = (math.ceil(max(region[i::2], default=1)) for i in (0, 1)) if numbers else (1, 1)
    size = height or max(bottom, 1), width or max(right, 1)
    try:
        draw(region, name, size, (64, 64))
    except MoLEError as error:
        raise MoLEError(f"--region {name}={printable(text)}: {error}") from None
    return region if numbers else as_text(region)


def _painted(name: str, text: str) -> Any:
    from PIL import Image

    from mole_diffusion.drawing.painted import as_mask, is_painted

    if is_painted(text):  # as the command line of a picture from `mole app` has it
        return as_mask(text)
    file = Path(text).expanduser()
    if not file.is_file():
        raise MoLEError(
            f"--region {name}={text}: neither a box LEFT,TOP,RIGHT,BOTTOM in fractions of the picture or pixels, "
            "nor a file. Example: --region cat=0,0,0.5,1 or --region cat=mask.png"
        )
    try:
        with Image.open(file) as picture:
            return picture.copy()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise MoLEError(f"--region {name}={text}: no picture that can be read ({error}). Save it as PNG.") from None


def _check_known(option: str, given: Collection[str], names: Collection[str]) -> None:
    for name in given:
        if name not in names:
            there = f"there are {', '.join(names)}" if names else "there is none"
            raise MoLEError(f"{option} {name}=…: there is no --lora {name}=…; {there}.")


def read_composition_options(entries: Sequence[str], name: str | None) -> dict[str, Any]:
    """The options of a method, from entries such as "own_words=2".

    Raises:
        MoLEError: An entry is malformed, or there is no --composition whose options they would be.
    """
    from mole_diffusion.yaml_files import parse_yaml

    if entries and name is None:
        raise MoLEError("--composition-option is an option of a composition. Say of which: --composition masks.")
    pairs = read_pairs("--composition-option", entries, "own_words=2")
    return {key.strip(): parse_yaml(text) for key, text in pairs.items()}


def read_composition(name: str | None, options: Mapping[str, Any], *, gates: bool) -> Composition | None:
    """The method by its name; `None` leaves it to the call.

    Raises:
        MoLEError: There is no such method or option, or it needs gates and there are none.
    """
    if name is None:
        return None
    from mole_diffusion.drawing import methods

    try:
        method = methods.method(name, options)
    except MoLEError as error:
        raise MoLEError(f"--composition: {error}") from None
    if "gates" in method.needs and not gates:
        raise MoLEError(f"composition {name!r} needs gates. Give trained ones, --gates FOLDER, or leave it out.")
    return method


def check_places(
    method: Composition | None,
    *,
    gates: bool,
    regions: Collection[str] | None,
    save_masks: bool,
    chosen: Mapping[str, float],
    roles: Mapping[str, Role],
    told: Collection[str],
) -> None:
    """Makes sure that regions have an effect, and that there will be masks to save.

    Args:
        method: Chosen by name; `None` leaves it to the call.
        gates: Whether gates are given, which are then the method.
        regions: The LoRAs that have one.
        save_masks: Whether masks are wanted.
        chosen: The LoRAs that draw, with their strengths.
        roles: Of those that have one other than "subject".
        told: The LoRAs whose trigger words are known.

    Raises:
        MoLEError: There would be none.
    """
    wish = "--region" if regions else "--save-masks" if save_masks else None
    if wish is None:
        return
    if (method is None and gates) or (method is not None and "words" not in method.needs):
        raise MoLEError(
            f"{wish} would do nothing: composition {method.name if method else 'mole'!r} knows no places. "
            "Choose --composition masks, masked_gates for gates that were trained to correct masks, or leave that "
            "option out."
        )
    if regions:
        return
    subjects = [name for name, strength in chosen.items() if strength and roles.get(name, "subject") == "subject"]
    several = [name for name, strength in chosen.items() if strength and roles.get(name, "subject") != "utility"]
    unknown = [name for name in subjects if name not in told]
    if len(several) < 2 or not subjects:
        raise MoLEError(
            "--save-masks: masks tell several LoRAs apart, and here the whole picture belongs to "
            f"{', '.join(several) or 'the base'}. Draw with two or more, or leave that option out."
        )
    if method is None and unknown:
        raise MoLEError(
            f"--save-masks: nobody said which words call {unknown[0]!r}, so there would be no masks. "
            f'Add --trigger {unknown[0]}="…" with the words it has in the prompt.'
        )


def read_size(height: int | None, width: int | None) -> None:
    """Raises MoLEError unless both are multiples of 8, as autoencoders want them."""
    for option, size in (("--height", height), ("--width", width)):
        if size is not None and size % 8:
            raise MoLEError(f"{option} {size}: must be a multiple of 8, such as {max(8, size // 8 * 8)}.")


def picture_files(out: Path, count: int) -> list[Path]:
    """Where `count` pictures go: `out` itself, or picture-0.png, picture-1.png … for picture.png.

    Raises:
        MoLEError: Pictures cannot be written in the format of the suffix.
    """
    from PIL import Image

    known = Image.registered_extensions()
    if known.get(out.suffix.lower()) not in Image.SAVE:
        raise MoLEError(f"--out {out}: a picture needs a suffix such as .png, got {out.suffix!r}.")
    return [out] if count == 1 else [out.with_name(f"{out.stem}-{index}{out.suffix}") for index in range(count)]
