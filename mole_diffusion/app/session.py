"""What the page keeps for each visitor: what was dropped, the job that runs, and what was drawn last."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..drawing import png
from ..drawing.as_command import as_command
from ..drawing.as_python import as_python
from ..drawing.settings import LoRASettings, PictureSettings
from ..errors import MoLEError
from ..files import file_name
from ..sheets import gate_heat_map, picture_sheet
from . import form
from .allowed_folders import AllowedFolders
from .comparison import comparison
from .gate_pictures import by_layer_and_step
from .offered_lora import inspect_offered
from .space import write_space
from .studio import FinishedPicture, Progress, Studio, Ticket


@dataclass
class LoRARow:
    """A LoRA on the page: its settings, and what was said of its file."""

    lora: LoRASettings
    line: str


@dataclass
class Session:
    """One visitor's page.

    Attributes:
        rows: The LoRAs, in the order of their colours.
        refused: Lines on files that were dropped and cannot be used.
        ticket: The ticket of the drawing that runs or waits.
        training: The ticket of the training that runs or waits.
        drawn: The latest pictures.
        files: The file of each picture in `drawn`.
        folder: Where this visitor's pictures lie; it is deleted with the session.
    """

    rows: list[LoRARow] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    ticket: Ticket = field(default_factory=Ticket)
    training: Ticket = field(default_factory=Ticket)
    drawn: list[FinishedPicture] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="mole-app-")))

    def __post_init__(self) -> None:
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def drop(self, files: Sequence[str]) -> None:
        """Takes LoRA files in; what cannot be used is said and takes no row."""
        self.refused = []
        for file in files:
            if len(self.rows) >= form.MOST_LORAS:
                self.refused.append(f"✗ {Path(file).name}: the page has {form.MOST_LORAS} rows, and all are taken.")
                continue
            offered = inspect_offered(file, tuple(row.lora.name for row in self.rows))
            if offered.lora is None:
                self.refused.append(offered.line)
            elif any(row.lora.sha256 == offered.lora.sha256 for row in self.rows):
                self.refused.append(f"✗ {Path(file).name} is there already.")
            else:
                self.rows.append(LoRARow(offered.lora, offered.line))

    def ask(self) -> None:
        """From now on `ticket` is that of the next drawing, also while it waits; the one before it ends."""
        self.ticket.cancel()
        self.ticket = Ticket()

    def ask_to_train(self) -> None:
        """The same for a training, which drawing leaves alone."""
        self.training.cancel()
        self.training = Ticket()

    def take(self, loras: Sequence[LoRASettings]) -> None:
        """Takes LoRAs in with the settings they have; each names a file that is there."""
        for lora in loras:
            offered = inspect_offered(lora.file)
            seen = offered.lora or lora
            self.rows.append(
                LoRARow(replace(lora, triggers=lora.triggers or seen.triggers, sha256=seen.sha256), offered.line)
            )

    def edit(self, fields: Sequence[Any]) -> None:
        """Takes over what was typed into the rows: on, name, strength, trigger and role of each in turn.

        Raises:
            MoLEError: A name is empty or comes twice, or a strength is no number.
        """
        for number, row in enumerate(self.rows):
            on, name, strength, trigger, role = fields[5 * number : 5 * number + 5]
            if not (name or "").strip():
                raise MoLEError(f"LoRA {number + 1} has no name. Give it one, such as {row.lora.name}.")
            if strength is None:
                raise MoLEError(f"{name} has no weight. Write a number, such as 1.")
            words = tuple(phrase.strip() for phrase in (trigger or "").split(",") if phrase.strip())
            changed = {"on": bool(on), "name": name.strip(), "strength": float(strength), "role": role}
            row.lora = replace(row.lora, triggers=words, **changed)
        names = [row.lora.name for row in self.rows]
        if len(set(names)) < len(names):
            raise MoLEError(f"two LoRAs have one name: {', '.join(names)}. Give each its own.")

    @property
    def loras(self) -> list[LoRASettings]:
        """Settings of every row."""
        return [row.lora for row in self.rows]

    def draw(self, studio: Studio, wanted: Sequence[PictureSettings]) -> Iterator[Progress]:
        """Draws; each picture is written with what it was made from and joins `drawn` and `files`."""
        self.drawn, self.files = [], []
        yield from self._run(studio, wanted, self._keep)

    def compare(self, studio: Studio, settings: PictureSettings, path: Path) -> Iterator[Progress]:
        """Draws each LoRA alone, the sum and this, and writes them side by side."""
        wanted = comparison(settings)
        pictures: list[FinishedPicture] = []
        yield from self._run(studio, [own for _, own in wanted], pictures.append)
        labels = [label for label, _ in wanted]
        row = ("seed " + str(settings.seed), [own.picture for own in pictures])
        picture_sheet([row], path, title=settings.prompt, columns=labels, cell=192)

    def place(self, name: str) -> Path:
        """A path in this visitor's folder."""
        return self.folder / name

    def restore(self, file: str, allowed: AllowedFolders) -> PictureSettings:
        """What a PNG was made from; its LoRAs become the rows.

        Raises:
            MoLEError: It does not tell.
        """
        settings = png.read_settings(file)
        found = form.find_again(settings, self.loras, allowed)
        self.rows, self.refused = [LoRARow(lora, line) for lora, line in found], []
        return settings

    def told(self, index: int) -> tuple[str, str, str]:
        """Python call, command line and settings of a picture that was drawn."""
        settings = self.drawn[index].settings
        return as_python(settings), as_command(settings), json.dumps(settings.to_dict(), indent=2, ensure_ascii=False)

    def space(self, out: Path) -> Path:
        """A Space of the first of the latest pictures; see `write_space`.

        Raises:
            MoLEError: There is no picture, or as `write_space`.
        """
        if not self.drawn:
            raise MoLEError("there is no picture yet. Draw one, and the Space begins with its settings.")
        return write_space(self.drawn[0].settings, out)

    def gates(self, index: int) -> list[Path]:
        """Pictures of what the gates gave: by layer, and by layer and step; none without gates."""
        found = self.drawn[index].gates
        if found is None:
            return []
        weights, places, loras = found
        layers, steps = self.place(f"gates-{index}.png"), self.place(f"gates-by-step-{index}.png")
        gate_heat_map(weights.mean(dim=-1), places, loras, layers, title="mean gate weights")
        return [layers, by_layer_and_step(weights, places, loras, steps)]

    def _keep(self, drawn: FinishedPicture) -> None:
        name = file_name("+".join(lora.name for lora in drawn.settings.loras if lora.on) or "base")
        path = self.place(f"{name}-seed{drawn.settings.seed}-{len(self.files)}.png")
        self.files.append(png.save(drawn.picture, path, drawn.settings))
        self.drawn.append(drawn)

    def _run(
        self, studio: Studio, wanted: Sequence[PictureSettings], take: Callable[[FinishedPicture], None]
    ) -> Iterator[Progress]:
        for event in studio.draw(wanted, self.ticket):
            if isinstance(event, FinishedPicture):
                take(event)
            else:
                yield event
