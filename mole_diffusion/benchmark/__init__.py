"""Many ways to compose, on the same prompts and seeds: drawn, measured and told as a report."""

from mole_diffusion.extras import needs

with needs("metrics", "a benchmark"):
    from mole_diffusion.benchmark.config import BenchmarkConfig
    from mole_diffusion.benchmark.report import write_report
    from mole_diffusion.benchmark.run import run_benchmark
    from mole_diffusion.benchmark.study import balance_study

__all__ = ["BenchmarkConfig", "balance_study", "run_benchmark", "write_report"]
