"""The method on the command line, its options, and whether what else was asked has an effect with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mole_diffusion.choices import Role
from mole_diffusion.errors import MoLEError
from mole_diffusion.methods import METHODS, Need, check_options

from .inputs import read_pairs


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


def check_composition(name: str | None, options: Mapping[str, Any], *, gates: bool) -> frozenset[Need]:
    """What a method by its name needs, with these options; what a call chooses by itself, for `None`.

    Raises:
        MoLEError: There is no such method or option, or it needs gates and there are none.
    """
    if name is None:
        return METHODS["mole" if gates else "masks"]().needs
    try:
        needs = check_options(name, options).needs
    except MoLEError as error:
        raise MoLEError(f"--composition: {error}") from None
    if "gates" in needs and not gates:
        raise MoLEError(f"composition {name!r} needs gates. Give trained ones, --gates FOLDER, or leave it out.")
    return needs


def check_places(
    name: str | None,
    needs: Collection[Need],
    *,
    regions: Sequence[str] | None,
    save_masks: bool,
    chosen: Mapping[str, float],
    roles: Mapping[str, Role],
) -> None:
    """Makes sure that regions have an effect, and that there can be masks to save.

    Args:
        name: The method, chosen by name; `None` leaves it to the call.
        needs: What it needs.
        regions: Those that were given.
        save_masks: Whether masks are wanted.
        chosen: The LoRAs that draw, with their strengths.
        roles: The roles of LoRAs that have another than "subject".

    Raises:
        MoLEError: There would be none.
    """
    wish = "--region" if regions else "--save-masks" if save_masks else None
    if wish is None:
        return
    if "words" not in needs:
        raise MoLEError(
            f"{wish} would do nothing: composition {name or 'mole'!r} knows no places. "
            "Choose --composition masks, masked_gates for gates that were trained to correct masks, or leave that "
            "option out."
        )
    several = [name for name, strength in chosen.items() if strength and roles.get(name, "subject") != "utility"]
    if not regions and (len(several) < 2 or not _subjects(chosen, roles)):
        raise MoLEError(
            "--save-masks: masks tell several LoRAs apart, and here the whole picture belongs to "
            f"{', '.join(several) or 'the base'}. Draw with two or more, or leave that option out."
        )


def check_told(chosen: Mapping[str, float], roles: Mapping[str, Role], told: Collection[str]) -> None:
    """Raises MoLEError unless the trigger words of every subject, which its file may say, are known to a call.

    Args:
        chosen: As in `check_places`.
        roles: As there.
        told: The LoRAs whose trigger words are known.
    """
    unknown = [name for name in _subjects(chosen, roles) if name not in told]
    if unknown:
        raise MoLEError(
            f"--save-masks: nobody said which words call {unknown[0]!r}, so there would be no masks. "
            f'Add --trigger {unknown[0]}="…" with the words it has in the prompt.'
        )


def _subjects(chosen: Mapping[str, float], roles: Mapping[str, Role]) -> list[str]:
    return [name for name, strength in chosen.items() if strength and roles.get(name, "subject") == "subject"]
