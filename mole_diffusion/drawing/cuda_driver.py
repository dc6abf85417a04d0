"""Whether there is a CUDA device at all, told before torch is imported, which takes seconds."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

GPUS = Path("/proc/driver/nvidia/gpus")
# AMD's GPUs are called "cuda" by torch too: there it has to say itself, as on Windows.
OTHERS = (Path("/dev/kfd"), Path("/dev/dxg"))


def lacks_cuda(name: str) -> bool:
    """Whether the device of that name, such as "cuda:1", is surely not there: no driver, or fewer GPUs.

    False also where nobody can tell but torch, and where torch is imported already.
    """
    kind, _, number = name.partition(":")
    if kind != "cuda" or "torch" in sys.modules or os.name == "nt" or any(path.exists() for path in OTHERS):
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    known = len(list(GPUS.iterdir())) if GPUS.is_dir() else 0
    return known > 0 and number.isdecimal() and int(number) >= known
