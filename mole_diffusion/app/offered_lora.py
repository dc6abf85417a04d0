"""What an offered LoRA file is, in one line: what it is for, what calls it, or why it cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import toybox
from ..drawing.settings import TOYBOX, LoRASettings
from ..errors import MoLEError, printable
from ..lora import inspect_lora


@dataclass(frozen=True)
class OfferedLoRA:
    """A LoRA that can be used, or why it cannot.

    Attributes:
        line: To show.
        lora: Its settings as they begin; `None` for a file that is refused.
    """

    line: str
    lora: LoRASettings | None


def inspect_offered(file: str, taken: tuple[str, ...] = ()) -> OfferedLoRA:
    """Looks into a LoRA.

    Args:
        file: A path, or "toybox:cat".
        taken: Names that other LoRAs have.
    """
    is_toybox = file.startswith(f"{TOYBOX}:")
    try:
        stem = file.removeprefix(f"{TOYBOX}:") if is_toybox else Path(file).stem
        path = str(toybox.lora_path(stem)) if is_toybox else file
        report = inspect_lora(path)
    except MoLEError as error:
        return OfferedLoRA(f"✗ {_without_folder(str(error), file)}", None)
    ranks = sorted(report.ranks)
    strengths = ", ".join(f"{scaling:g}" for scaling in report.scalings[:3])
    parts = [
        "for the toybox" if is_toybox else _base(report.family),
        f"{report.layout}, {sum(report.modules.values())} modules",
        f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}",
        f"scaling {strengths}{' …' if len(report.scalings) > 3 else ''}",
        f"called by {', '.join(map(printable, report.triggers))}"
        if report.triggers
        else "names no words: say its trigger",
    ]
    lora = LoRASettings(_free(printable(stem), taken), file, triggers=report.triggers[:1], sha256=report.sha256)
    return OfferedLoRA(f"✓ {' · '.join(parts)}", lora)


def _base(family: str) -> str:
    return "its base is not told" if family == "unknown" else f"for {family}"


def _free(name: str, taken: tuple[str, ...]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


def _without_folder(message: str, file: str) -> str:
    """Where an upload lies on this computer is nobody's business."""
    return message.replace(file, Path(file).name)
