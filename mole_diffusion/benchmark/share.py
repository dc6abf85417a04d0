"""Which pictures of a benchmark each of several processes draws: every one works it out by itself, and all agree."""

from __future__ import annotations

import os
from itertools import count, groupby

from mole_diffusion.benchmark.cell import Cell
from mole_diffusion.benchmark.config import BenchmarkConfig


def process_share() -> tuple[int, int]:
    """Index and number of processes, as `accelerate launch` and `torchrun` tell them; (0, 1) alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def share(config: BenchmarkConfig, rank: int, processes: int) -> list[list[Cell]]:
    """The batches of one process, in the order of the benchmark.

    Batches go round in turn. Where gates are trained, all batches of a composition and method go to one process, which
    trains them too, and these go round in a turn of their own. What is done already plays no part, so that processes
    that look at different times agree.
    """
    mine: list[list[Cell]] = []
    turns, trainings = count(), count()
    for _, batches in groupby(config.batches(), key=lambda batch: (batch[0].composition, batch[0].method.label)):
        group = list(batches)
        if group[0][0].method.training is not None:
            mine += group if next(trainings) % processes == rank else []
        else:
            mine += [batch for batch in group if next(turns) % processes == rank]
    return mine
