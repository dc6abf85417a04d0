"""What identifies one picture of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mole_diffusion.benchmark.methods import Method
from mole_diffusion.files import file_name


@dataclass(frozen=True)
class Cell:
    """One picture of a benchmark: which LoRAs, composed how, for which prompt and seed.

    Attributes:
        composition: Names of its LoRAs, "cat+boot+teapot".
        method: How they are composed.
        kept: Those that are not masked out. The prompt names only these.
        prompt: Index of the prompt.
        seed: Seed of the starting noise.
    """

    composition: str
    method: Method
    kept: tuple[str, ...]
    prompt: int
    seed: int

    @property
    def loras(self) -> list[str]:
        """Names of all its LoRAs."""
        return self.composition.split("+")

    @property
    def path(self) -> Path:
        """Where its picture and its row lie, without suffix, below their folders."""
        folder = Path(file_name(self.composition)) / file_name(self.method.label)
        if len(self.kept) < len(self.loras):
            folder /= file_name("+".join(self.kept))
        return folder / f"p{self.prompt:02d}-s{self.seed:04d}"
