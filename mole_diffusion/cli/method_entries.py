"""The method on the command line, its options, and whether what else was asked has an effect with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mole_diffusion.choices import Role
from mole_diffusion.errors import MoLEError

from .inputs import read_pairs

if TYPE_CHECKING:
    from mole_diffusion.composition import Composition


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
        roles: The roles of LoRAs that have another than "subject".
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
