"""Which LoRAs are subjects, styles or utilities, as numbers to weigh with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..choices import Role
from ..experts import Run
from .call import Call


def roles(run: Run, role: Role) -> Tensor:
    """`(N,)`: 1 for the LoRAs of that role. Outside of a pipeline's call all are subjects."""
    of_all = run.call.roles if isinstance(run.call, Call) else ("subject",) * run.keep.shape[-1]
    return torch.tensor([float(own == role) for own in of_all], device=run.keep.device)
