"""The tables of a benchmark's report, each as a piece of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mole_diffusion.benchmark.config import BenchmarkConfig
from mole_diffusion.benchmark.row import (
    HIGHER_IS_BETTER,
    IMAGE,
    TEXT,
    Row,
    by_case,
    by_picture,
    labels,
    mean,
    measured,
    num_kept,
    of,
)
from mole_diffusion.benchmark.stats import correlation, paired_bootstrap, rank_correlation, wins
from mole_diffusion.tables import markdown_table, number

TRUTHS = ("presence rate", "all-present rate", "confusion rate")
BY_CASE = (TEXT, IMAGE, "presence rate", "all-present rate")


def means_by_method(config: BenchmarkConfig, rows: Sequence[Row]) -> list[Row]:
    """One line for each method with the means of all numbers, for CSV."""
    names = [*(name for name in HIGHER_IS_BETTER if any(name in row for row in rows)), "UNet evaluations", "seconds"]
    return [
        {"method": label, "pictures": len(of(rows, label))} | {name: mean(of(rows, label), name) for name in names}
        for label in labels(config)
    ]


def method_table(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    """Means over all pictures."""
    lines = [[label, str(len(of(rows, label))), *_means(of(rows, label), measured(rows))] for label in labels(config)]
    return markdown_table(["method", "pictures", *measured(rows)], lines)


def difference_table(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    """Each method minus the reference, with paired bootstrap intervals; empty where there is nothing to pair."""
    lines = []
    for label in labels(config):
        pairs = [[by_picture(rows, method, name) for method in (label, config.reference)] for name in measured(rows)]
        if label != config.reference and all(ours.keys() & theirs.keys() for ours, theirs in pairs):
            lines.append([label, *(interval(paired_bootstrap(ours, theirs)) for ours, theirs in pairs)])
    if not lines:
        return ""
    head = (
        f"## Difference to {config.reference}\n\nPaired by composition, prompt and seed; 95 % bootstrap intervals. "
        "They say how sure the means over these compositions are, not how other compositions would do.\n\n"
    )
    return head + markdown_table(["method", *measured(rows)], lines)


def count_table(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    """Means by how many LoRAs drew; empty where it is the same number everywhere."""
    counts = sorted({num_kept(row) for row in rows})
    if len(counts) < 2:
        return ""
    lines = []
    for count in counts:
        mine = [row for row in rows if num_kept(row) == count]
        for label in labels(config):
            if of(mine, label):
                lines.append([str(count), label, str(len(of(mine, label))), *_means(of(mine, label), measured(rows))])
    head = "## By number of LoRAs that draw\n\n"
    return head + markdown_table(["LoRAs", "method", "pictures", *measured(rows)], lines)


def wins_table(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    points = {
        name: wins(by_case(config, rows, name), higher_is_better=HIGHER_IS_BETTER[name]) for name in measured(rows)
    }
    lines = [[label, *(f"{points[name].get(label, 0):.3g}" for name in points)] for label in labels(config)]
    return markdown_table(["method", *points], lines)


def cost_table(config: BenchmarkConfig, rows: Sequence[Row], training: Mapping[str, float]) -> str:
    """What a picture and, in minutes by method, the training of all gates took."""
    memory = any(row["memory (MiB)"] is not None for row in rows)
    lines = []
    for label in labels(config):
        mine = of(rows, label)
        peak = max((row["memory (MiB)"] for row in mine if row["memory (MiB)"] is not None), default=None)
        line = [label, number(mean(mine, "UNet evaluations"), 0), number(mean(mine, "seconds"), 2)]
        line += [number(peak, 0)] if memory else []
        lines.append([*line, number(training.get(label), 1)] if training else line)
    header = ["method", "UNet evaluations", "seconds", *(["memory beyond the weights (MiB)"] if memory else [])]
    drawing = sum(row["seconds"] for row in rows) / 60
    total = f"\nDrawing took {drawing:.0f} minutes" + (
        f" and training {sum(training.values()):.0f}" if training else ""
    )
    header += ["training of all its gates (minutes)"] if training else []
    return markdown_table(header, lines) + total + ", summed over processes.\n"


def correlation_table(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    """How far the alignments tell the truth, where it is known; else empty."""
    truths = [name for name in TRUTHS if name in measured(rows)]
    if not truths:
        return ""
    by_method = means_by_method(config, rows)
    sides = {"pictures": rows, "means of methods": [row for row in by_method if row["pictures"]]}
    lines = []
    for alignment in (name for name in measured(rows) if "alignment" in name):
        for side, points in sides.items():
            if len(points) < 3:  # two always lie on a line
                continue
            pairs = [([row[alignment] for row in points], [row[truth] for row in points]) for truth in truths]
            cells = (f"{number(correlation(*pair), 2)} / {number(rank_correlation(*pair), 2)}" for pair in pairs)
            lines.append([alignment, f"{len(points)} {side}", *cells])
    head = (
        "## How far can one trust alignment?\n\nCorrelation with the truth that the oracle sees: Pearson's r / "
        "Spearman's ρ.\n\n"
    )
    return head + markdown_table(["", "over", *truths], lines)


def case_tables(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    """A table for each of the main measures, compositions down and methods across, the best in bold.

    More is better in all of these measures.
    """
    parts = []
    for name in (name for name in BY_CASE if name in measured(rows)):
        lines = []
        for one, means in by_case(config, rows, name).items():
            cells = [number(means.get(label)) for label in labels(config)]
            best = number(max(means.values()))
            lines.append([one, *(f"**{cell}**" if cell == best and len(set(cells)) > 1 else cell for cell in cells)])
        parts.append(f"### {name[0].upper()}{name[1:]}\n\n" + markdown_table(["composition", *labels(config)], lines))
    return "\n".join(parts)


def failure_table(rows: Sequence[Row]) -> str:
    """Which errors came where, and how often; empty without any."""
    failed = [(row["composition"], row["method"], row["error"]) for row in rows if "error" in row]
    if not failed:
        return ""
    lines = [[*what, str(failed.count(what))] for what in dict.fromkeys(failed)]
    return "## Failed\n\n" + markdown_table(["composition", "method", "error", "pictures"], lines)


def interval(values: tuple[float, float, float]) -> str:
    """A mean with its interval."""
    middle, low, high = values
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"


def _means(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    return [number(mean(rows, name)) for name in names]
