"""The random numbers of a training, each step's its own."""

from __future__ import annotations

import hashlib

import torch


def step_generator(seed: int, step: int) -> torch.Generator:
    """A fresh CPU generator for one step: the numbers of step k do not depend on where a resumed run began.

    On the CPU whatever the device, so that a run draws the same pictures and noise everywhere.
    """
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
