"""What a benchmark found: tables, plots and sheets of pictures, as a page."""

from mole_diffusion.benchmark.report.page import write_report

__all__ = ["write_report"]
