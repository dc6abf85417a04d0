"""How long something takes: of the processor and by the clock, on a CPU and on a GPU."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Name = TypeVar("Name", bound=str)
QUEUED = 5  # calls of a GPU that are timed together: as a denoising loop calls, without waiting for one before the next


def on_gpu(device: str) -> bool:
    """Whether a device computes beside the processor, which only tells it what to do."""
    return torch.device(device).type == "cuda"


def wait(device: str) -> None:
    """Returns when a GPU has done what it was told; at once on a CPU."""
    if on_gpu(device):
        torch.cuda.synchronize(device)


def in_turn(sides: Iterable[Name], rounds: int) -> Iterator[tuple[int, list[Name]]]:
    """The number of each round, and all sides in another order in each.

    What ran before leaves its memory and its caches: so no side may always come after the same one. The orders are the
    same every time.
    """
    order, rng = list(sides), random.Random(0)
    for turn in range(rounds):
        rng.shuffle(order)
        yield turn, list(order)


def timed(call: Callable[[], Any], device: str, calls: int = 1) -> tuple[float, float]:
    """Seconds of one call: of the processor, and by the clock.

    On a GPU, the first is what it takes until everything is queued, and the second until the GPU is done. Where both
    are the same, the GPU waits for the processor.

    Args:
        call: What is timed.
        device: Where it computes.
        calls: How many follow one another before the clock is read.
    """
    wait(device)
    processor, clock = time.process_time(), time.perf_counter()
    for _ in range(calls):
        call()
    spent = time.process_time() - processor
    wait(device)
    return spent / calls, (time.perf_counter() - clock) / calls


def spent(action: Callable[[], Any], device: str) -> float:
    """Seconds that something takes which is done once: of the processor; on a GPU by the clock."""
    processor, clock = timed(action, device)
    return clock if on_gpu(device) else processor


def busy(call: Callable[[], Any], device: str) -> float | None:
    """Seconds that a GPU computes for one call, its kernels added up; `None` on a CPU, and where nobody counts them."""
    if not on_gpu(device):
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        wait(device)
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6 or None
