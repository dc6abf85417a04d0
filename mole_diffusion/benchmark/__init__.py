"""Many ways to compose, on the same prompts and seeds: drawn, measured and told as a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mole_diffusion.lazily import on_first_use

if TYPE_CHECKING:
    from mole_diffusion.benchmark.config import BenchmarkConfig
    from mole_diffusion.benchmark.report import write_report
    from mole_diffusion.benchmark.run import run_benchmark
    from mole_diffusion.benchmark.study import balance_study
else:
    __getattr__, __dir__ = on_first_use(__name__, "metrics", "a benchmark")

__all__ = ["BenchmarkConfig", "balance_study", "run_benchmark", "write_report"]
