"""How much memory a call takes at its peak, beyond what was there before."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch.autograd.profiler import profile


def call_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """MiB that tensors take at the peak of a call, beyond those that were there: weights do not count.

    Call it once before, so that nothing is counted that is made once and stays.

    Args:
        call: The call to measure.
        device: Where the call computes.

    Returns:
        On a GPU as its allocator says, on the CPU the highest running sum of all allocations that torch's profiler
        sees, the same each time but for some bytes; `None` on other devices.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if device.type != "cpu":
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell standard error of every start and stop
    with _no_collection(), profile(profile_memory=True) as profiler:
        call()
    # The profiler's own records: a trace in JSON says the same in ten times the time of a call.
    changes = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes), default=0) / 2**20


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage is collected now and not in between, where it would come at another moment each time."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
