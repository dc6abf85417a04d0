"""What a user chooses from by name, and how a choice is checked: known before torch is imported, for seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from .errors import MoLEError

Role = Literal["subject", "style", "utility"]
ROLES: tuple[Role, ...] = ("subject", "style", "utility")

SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler", "DPMSolverSDEScheduler", "EDMEulerScheduler", "LCMScheduler",
    "TCDScheduler",
)  # fmt: skip
"""All that diffusers makes from one another's settings; the last two are for utilities that draw in few steps."""

Layout = Literal["diffusers", "kohya", "peft"]
LAYOUTS: tuple[Layout, ...] = ("diffusers", "kohya", "peft")
"""What LoRA files are written in."""

Tracker = Literal["none", "tensorboard", "wandb"]
TRACKERS: tuple[Tracker, ...] = ("none", "tensorboard", "wandb")

PRESETS = ("default", "real", "masks", "paper", "official")
"""The names of ways to train gates."""

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla", "npu", "mlu", "musa", "privateuseone")
"""Kinds of devices that compute, of torch and of what is installed beside it; a number may follow: `cuda:1`."""

REUSABLE = ("vae", "clip", "base")
"""Parts of the toybox that another one may be built with."""


def check_names(given: Iterable[str], names: Sequence[str], argument: str) -> None:
    """Raises TypeError or MoLEError unless every entry of `given` is one of the LoRAs `names`, and none comes twice."""
    seen: set[str] = set()
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"`{argument}` must hold names of LoRAs, got {name!r} ({type(name).__name__}) among them.")
        if name not in names:
            loaded = f"Loaded are: {', '.join(names)}." if names else "None is loaded; call `load_loras` first."
            raise MoLEError(f"`{argument}` has {name!r}, which is not loaded. {loaded}")
        if name in seen:
            raise MoLEError(f"`{argument}` has {name!r} twice. Loaded are: {', '.join(names)}.")
        seen.add(name)
