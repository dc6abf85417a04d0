"""Which LoRAs gates were made for: what is saved of each, and how others are told from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mole_diffusion.errors import MoLEError

from ..lora import LoRA


class GatesError(MoLEError):
    """Gates that cannot be used as they are: a damaged folder, or LoRAs they were not trained with."""


def lora_identity(lora: LoRA) -> dict[str, Any]:
    """What gates remember of a LoRA: its name, the hash of its factors, its ranks."""
    return {"name": lora.name, "sha256": lora.fingerprint, "ranks": list(lora.ranks)}


def check_loras(expected: Sequence[Mapping[str, Any]], loras: Sequence[LoRA]) -> None:
    """Checks that these are the LoRAs that gates were made for, in their order.

    Raises:
        GatesError: They are not; the message names every difference in number, names, order, ranks and factors.
    """
    known, names = [lora["name"] for lora in expected], [lora.name for lora in loras]
    if names != known:
        order = " in this order" if sorted(names) == sorted(known) else ""
        raise GatesError(
            f"These gates were trained for the LoRAs {known}{order}, got {names}. Load those{order}, or train new "
            "gates."
        )
    problems = []
    for want, lora in zip(expected, loras, strict=True):
        if list(want["ranks"]) != list(lora.ranks):
            problems.append(f"{lora.name!r} has ranks {list(lora.ranks)} and not {list(want['ranks'])}")
        # Folders of earlier versions have the hash of the file, with which nothing else has the same.
        if want["sha256"] not in (lora.fingerprint, lora.sha256):
            problems.append(
                f"{lora.name!r} has factors of SHA-256 {lora.fingerprint[:12]}… and not {want['sha256'][:12]}…"
            )
    if problems:
        raise GatesError(
            f"These gates were trained for other LoRAs: {'; '.join(problems)}. Load the ones they were trained with, "
            "in whatever file, or train new gates."
        )
