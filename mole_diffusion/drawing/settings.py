"""`PictureSettings`: everything one picture is made from, and nothing else; to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from ..choices import ROLES, Role
from ..drawable import check_drawable
from ..errors import MoLEError, printable
from .painted import is_painted

if TYPE_CHECKING:
    from ..region_forms import Box

SavedRegion: TypeAlias = "Box | str"
"""A box `(left, top, right, bottom)`, in fractions of the picture or pixels, or a mask as `painted` writes it."""

TOYBOX = "toybox"
LARGEST_SEED = 2**63 - 1
MOST_IMAGES = 10_000


@dataclass(frozen=True)
class LoRASettings:
    """One LoRA of a picture.

    Attributes:
        name: Its name in the pipeline.
        file: Path, or `"toybox:cat"` for a subject of the toybox.
        on: Whether it takes part.
        strength: The number that its change is multiplied by.
        triggers: Words that call it in the prompt; empty: those its file tells, else its name.
        role: `"subject"`, `"style"` or `"utility"`.
        sha256: SHA-256 of the file, where it was looked at.
    """

    name: str
    file: str
    on: bool = True
    strength: float = 1.0
    triggers: tuple[str, ...] = ()
    role: Role = "subject"
    sha256: str = ""

    @property
    def path(self) -> str:
        """The file, that of a toybox subject included.

        Raises:
            MoLEError: There is no such subject.
        """
        if not self.file.startswith(f"{TOYBOX}:"):
            return self.file
        from .. import toybox

        return str(toybox.lora_path(self.file.removeprefix(f"{TOYBOX}:")))


@dataclass(frozen=True)
class PictureSettings:
    """What `mole generate` and `mole app` draw from; each field is the option of that name.

    Attributes:
        regions: By the LoRA: boxes and painted masks, united.
        composition_options: Arguments of the composition's class.
        num_images: How many were drawn in one call, with `seed` and those after it.
        index: The place of this picture among them.
        guidance_scale: `None` for what the base's pipeline takes by default: 7.5, and less for most transformers.
        device, dtype: What it was computed on, and in which format: other ones round otherwise.
    """

    prompt: str
    base: str = TOYBOX
    base_config: str | None = None
    loras: tuple[LoRASettings, ...] = ()
    gates: str | None = None
    composition: str | None = None
    composition_options: Mapping[str, Any] = field(default_factory=dict)
    regions: Mapping[str, tuple[SavedRegion, ...]] = field(default_factory=dict)
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int = 30
    scheduler: str | None = None
    guidance_scale: float | None = None
    seed: int = 0
    num_images: int = 1
    index: int = 0
    device: str = "cpu"
    dtype: str = "float32"

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; what is as by default is left out."""
        told = _told(self)
        if self.loras:
            told["loras"] = [_told(lora) for lora in self.loras]
        if self.regions:
            told["regions"] = {
                name: [part if isinstance(part, str) else list(part) for part in parts]
                for name, parts in self.regions.items()
            }
        return told

    @classmethod
    def from_dict(cls, given: Any) -> PictureSettings:
        """Reads what `to_dict` wrote, wherever it has been since.

        Raises:
            MoLEError: A key is unknown, or a value is not of its kind.
        """
        values = _known(cls, given, "settings of a picture")
        loras = values.get("loras", [])
        if not isinstance(loras, list):
            raise MoLEError(f"`loras` must be a list, got {_shown(loras)}.")
        values["loras"] = tuple(_lora(lora) for lora in loras)
        names = [lora.name for lora in values["loras"]]
        if len(set(names)) < len(names):
            raise MoLEError(f"`loras` has a name twice: {', '.join(names)}. Give each its own.")
        values["regions"] = {name: _parts(name, parts, names) for name, parts in _table(values, "regions").items()}
        values["composition_options"] = dict(_table(values, "composition_options"))
        _check(values, str, "prompt", "base", "device", "dtype")
        _check(values, str, "base_config", "gates", "composition", "negative_prompt", "scheduler", optional=True)
        for name, smallest, largest in (
            ("steps", 1, 10_000),
            ("seed", 0, LARGEST_SEED),
            ("num_images", 1, MOST_IMAGES),
            ("index", 0, MOST_IMAGES - 1),
        ):
            _check_range(values, name, smallest, largest)
        for name in ("width", "height"):
            if values.get(name) is not None:
                _check_range(values, name, 8, 65_536)
        if values.get("guidance_scale") is not None:
            values["guidance_scale"] = _finite("guidance_scale", values["guidance_scale"])
        if "prompt" not in values:
            raise MoLEError("settings of a picture need a `prompt`.")
        return cls(**values)


def _told(value: Any) -> dict[str, Any]:
    """The fields that differ from their defaults, tuples as lists."""
    plain = {f.name: getattr(value, f.name) for f in fields(value)}
    defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(value)}
    return {name: list(own) if isinstance(own, tuple) else own for name, own in plain.items() if own != defaults[name]}


def _known(cls: type, given: Any, what: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise MoLEError(f"{what} must be a dictionary, got {_shown(given)}.")
    names = [f.name for f in fields(cls)]
    unknown = [str(key) for key in given if key not in names]
    if unknown:
        raise MoLEError(f"{what} have no {_shown(unknown[0])}; they have {', '.join(names)}.")
    return dict(given)


def _lora(given: Any) -> LoRASettings:
    values = _known(LoRASettings, given, "settings of a LoRA")
    for name in ("name", "file"):
        if not isinstance(values.get(name), str) or not values[name].strip():
            raise MoLEError(f"a LoRA needs a `{name}`, got {_shown(values.get(name))}.")
    _check(values, str, "sha256")
    if not isinstance(values.get("on", True), bool):
        raise MoLEError(f"`on` of {_shown(values['name'])} must be true or false, got {_shown(values['on'])}.")
    if values.get("role", "subject") not in ROLES:
        raise MoLEError(f"the role of {_shown(values['name'])} must be one of {', '.join(ROLES)}.")
    triggers = values.get("triggers", [])
    if not isinstance(triggers, list) or not all(isinstance(phrase, str) and phrase.strip() for phrase in triggers):
        raise MoLEError(f"`triggers` of {_shown(values['name'])} must be a list of words, got {_shown(triggers)}.")
    values["triggers"] = tuple(triggers)
    values["strength"] = _finite(f"strength of {values['name']}", values.get("strength", 1.0))
    return LoRASettings(**values)


def _parts(name: str, parts: Any, names: list[str]) -> tuple[SavedRegion, ...]:
    if name not in names:
        raise MoLEError(f"`regions` has {_shown(name)}, which is none of the LoRAs: {', '.join(names)}.")
    if not isinstance(parts, list) or not parts:
        raise MoLEError(f"the regions of {_shown(name)} must be a list, got {_shown(parts)}.")
    read: list[SavedRegion] = []
    for part in parts:
        if isinstance(part, list) and len(part) == 4:
            read.append(cast("Box", tuple(_finite(f"region of {name}", number) for number in part)))
        elif isinstance(part, str) and is_painted(part):
            read.append(part)
        else:
            raise MoLEError(
                f"a region of {_shown(name)} is {_shown(part)}. Give [left, top, right, bottom] or a painted mask."
            )
    return tuple(read)


def _table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = values.get(name, {})
    if not isinstance(table, Mapping) or not all(isinstance(key, str) for key in table):
        raise MoLEError(f"`{name}` must be a dictionary, got {_shown(table)}.")
    return table


def _check(values: Mapping[str, Any], kind: type, *names: str, optional: bool = False) -> None:
    for name in names:
        if name in values and not (isinstance(values[name], kind) or (optional and values[name] is None)):
            raise MoLEError(f"`{name}` must be of type {kind.__name__}, got {_shown(values[name])}.")


def _check_range(values: Mapping[str, Any], name: str, smallest: int, largest: int) -> None:
    if name not in values:
        return
    number = values[name]
    if isinstance(number, bool) or not isinstance(number, int) or not smallest <= number <= largest:
        raise MoLEError(f"`{name}` must be a whole number from {smallest} to {largest}, got {_shown(number)}.")


def _finite(name: str, number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, Real):
        raise MoLEError(f"the {name} must be a number, got {_shown(number)}.")
    check_drawable(f"the {name}", number)
    return float(number)


def _shown(value: Any) -> str:
    return printable(repr(value), 100)
