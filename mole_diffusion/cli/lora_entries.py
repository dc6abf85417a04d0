"""LoRAs on the command line of `mole generate`: files and strengths, and what is said of each by its name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from mole_diffusion.choices import ROLES, Role, check_names
from mole_diffusion.drawable import check_drawable
from mole_diffusion.errors import MoLEError

from .inputs import read_pairs, read_paths, read_several

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


def read_loras(entries: Sequence[str], *, with_toybox: bool) -> tuple[dict[str, str], dict[str, float]]:
    """The file and the strength of each LoRA, from entries such as "cat=cat.safetensors:0.8".

    Only a number after the last colon is a strength, so that C:\\cat.safetensors is a file.

    Args:
        entries: What was given, one text for each `--lora`.
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
    for name, given in read_paths("--lora", entries, "cat=cat.safetensors or cat=cat.safetensors:0.8").items():
        file, _, last = given.rpartition(":")
        has_strength = bool(file) and re.fullmatch(NUMBER, last) is not None
        files[name] = file if has_strength else given
        strengths[name] = float(last) if has_strength else 1.0
        check_drawable(f"--lora {name}={given}: the strength", strengths[name], "Such as 0.8.")
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
    names = [name.strip() for name in only.split(",")] if only.strip() else []
    check_names(names, list(strengths), "--only")
    return {name: strengths[name] for name in names}


def read_trigger_entries(entries: Sequence[str], names: Collection[str]) -> dict[str, list[str]]:
    """The words that call each LoRA; several for a LoRA that has several entries.

    Raises:
        MoLEError: An entry is malformed or names no LoRA.
    """
    triggers = read_several("--trigger", entries, 'cat="<v1> cat"')
    check_known("--trigger", triggers, names)
    return triggers


def read_role_entries(entries: Sequence[str], names: Collection[str]) -> dict[str, Role]:
    """The role of each LoRA that has an entry.

    Raises:
        MoLEError: An entry is malformed, names no LoRA, or the role is unknown.
    """
    roles = read_pairs("--role", entries, "ink=style")
    check_known("--role", roles, names)
    for name, role in roles.items():
        if role not in ROLES:
            raise MoLEError(f"--role {name}={role}: a role is one of {', '.join(ROLES)}.")
    return roles  # type: ignore[return-value]


def check_known(option: str, given: Collection[str], names: Collection[str]) -> None:
    """Raises MoLEError unless every name that an option was given for is that of a LoRA."""
    for name in given:
        if name not in names:
            there = f"there are {', '.join(names)}" if names else "there is none"
            raise MoLEError(f"{option} {name}=…: there is no --lora {name}=…; {there}.")
