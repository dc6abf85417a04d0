"""How much memory a call takes at its peak, beyond what was there before."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.autograd.profiler import profile


def call_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """MiB that tensors take at the peak of a call, beyond those that were there: weights do not count.

    Call it once before, so that nothing is counted that is made once and stays.

    Args:
        call: The call to measure.
        device: Where the call computes.

    Returns:
        On a GPU as its allocator says, on the CPU the highest running sum of all allocations that torch's profiler
        sees; `None` on other devices.
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
    # What was there is not given back in between: torch would warn that it does not know how large that was.
    there = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    with _no_collection(), profile(profile_memory=True) as profiler:
        call()
    del there
    return max(accumulate(_changes(profiler)), default=0) / 2**20


def _changes(profiler: profile) -> Iterator[int]:
    """Bytes that were taken (positive) or given back (negative), one after the other, of what the call itself took.

    What was there before and is given back in between, such as what an earlier call left behind, is no saving of this
    call's, and would make its number depend on the calls before it.
    """
    # The profiler's own records: a trace in JSON says the same in ten times the time of a call.
    results: Any = profiler.kineto_results  # its types do not know which event has which fields
    events, changes = list(results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    taken: set[int] = set()
    for _, address, size in sorted(changes):
        if size > 0:
            taken.add(address)
        if address in taken:
            yield size
        if size < 0:
            taken.discard(address)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage of the call is not collected in between, where that would come at another moment each time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
