"""How much memory a training took."""

from __future__ import annotations

import sys

import torch


def peak_memory(device: torch.device) -> float | None:
    """The most memory so far in GiB: of tensors on a GPU, elsewhere of the whole process.

    None on systems that do not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
