"""What a method is told of the call of a pipeline that a forward pass belongs to, and where it keeps what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..choices import Role
from ..experts.blocks import Blocks
from .prompt import PromptWords
from .regions import RegionMap


@dataclass(eq=False)
class Call:
    """One call of a pipeline. Everything in it ends with the call.

    Attributes:
        names: The loaded LoRAs, in the order of the experts.
        roles: The role of each. A `"subject"` is a thing in the picture and acts where it is; a `"style"` acts
            everywhere but on subjects' words; a `"utility"` (LCM, Lightning) acts everywhere and has no share.
        scheduler: The scheduler that steps through this call.
        words: Where in the prompts each LoRA's trigger words stand; `None` until the prompts are read, and where
            they never are (prompt embeddings of unknown words).
        regions: The regions a user gave; `regions.fixed` names the LoRAs that have one. `None` without.
        region_prompts: What a user wants in a LoRA's region, by the LoRA.
        found: The regions a method found, for the pipeline to hand out afterwards.
        prior: Whether this is the pass without LoRAs that comes before the picture.
        state: What a method remembers from step to step; a method uses itself as the key.
    """

    names: tuple[str, ...]
    roles: tuple[Role, ...]
    scheduler: Any = None
    words: PromptWords | None = None
    regions: RegionMap | None = None
    region_prompts: dict[str, str] = field(default_factory=dict)
    found: RegionMap | None = None
    prior: bool = False
    state: dict[Any, Any] = field(default_factory=dict)

    @property
    def timesteps(self) -> Sequence[float] | Tensor:
        """All timesteps of the present sampling run."""
        timesteps: Sequence[float] | Tensor = self.scheduler.timesteps
        return timesteps


_CURRENT: Blocks[Call | None] = Blocks("mole_diffusion.call")


def current_call() -> Call | None:
    """The call that runs in this thread."""
    return _CURRENT.holding()


def running(call: Call | None) -> AbstractContextManager[None]:
    """A `with` block in which `call` is the current call; with `None` there is none in it."""
    return _CURRENT.open(call)
