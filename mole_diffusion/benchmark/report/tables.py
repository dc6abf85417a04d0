"""The tables of a benchmark's report, each as a piece of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mole_diffusion.benchmark.config import BenchmarkConfig
from mole_diffusion.benchmark.measures import (
    ALL_PRESENT,
    CONFUSION,
    IMAGE,
    MEASURES,
    PRESENCE,
    REGION,
    TEXT,
    Measure,
)
from mole_diffusion.benchmark.report.groups import by_picture, mean, mean_of, means_by_loras, measured, of_method
from mole_diffusion.benchmark.row import Row
from mole_diffusion.benchmark.stats import correlation, paired_bootstrap, rank_correlation, wins
from mole_diffusion.tables import markdown_table, number

ALIGNMENTS = (TEXT, IMAGE, REGION)
SHOWN_TRUTHS = (PRESENCE, ALL_PRESENT, CONFUSION)
BY_LORAS = (TEXT, IMAGE, PRESENCE, ALL_PRESENT)
"""Measures with a table of their own. More is better in all of them."""


def means_by_method(config: BenchmarkConfig, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line for each method with the means of all numbers, for CSV."""
    there = [measure for measure in MEASURES if any(measure.key in row.numbers for row in rows)]
    lines = []
    for label in config.labels:
        mine = of_method(rows, label)
        cost = {"evaluations": mean(row.evaluations for row in mine), "seconds": mean(row.seconds for row in mine)}
        means = {measure.key: mean_of(mine, measure) for measure in there}
        lines.append({"method": label, "pictures": len(mine), **means, **cost})
    return lines


def method_table(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    """Means over all pictures."""
    lines = []
    for label in config.labels:
        mine = of_method(rows, label)
        lines.append([label, str(len(mine)), *_means(mine, measured(rows))])
    return markdown_table(["method", "pictures", *_headings(rows)], lines)


def difference_table(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    """Each method minus the reference, with paired bootstrap intervals; empty where there is nothing to pair."""
    lines = []
    for label in config.labels:
        pairs = [
            [by_picture(rows, method, measure) for method in (label, config.reference)] for measure in measured(rows)
        ]
        if label != config.reference and all(ours.keys() & theirs.keys() for ours, theirs in pairs):
            lines.append([label, *(interval(paired_bootstrap(ours, theirs)) for ours, theirs in pairs)])
    if not lines:
        return ""
    head = (
        f"## Difference to {config.reference}\n\nPaired by composition, prompt and seed; 95 % bootstrap intervals. "
        "They say how sure the means over these compositions are, not how other compositions would do.\n\n"
    )
    return head + markdown_table(["method", *_headings(rows)], lines)


def count_table(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    """Means by how many LoRAs drew; empty where it is the same number everywhere."""
    counts = sorted({row.num_kept for row in rows})
    if len(counts) < 2:
        return ""
    lines = []
    for count in counts:
        mine = [row for row in rows if row.num_kept == count]
        for label in config.labels:
            drawn = of_method(mine, label)
            if drawn:
                lines.append([str(count), label, str(len(drawn)), *_means(drawn, measured(rows))])
    head = "## By number of LoRAs that draw\n\n"
    return head + markdown_table(["LoRAs", "method", "pictures", *_headings(rows)], lines)


def wins_table(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    """In how many compositions each method has the best mean."""
    points = [
        wins(means_by_loras(config, rows, measure), higher_is_better=measure.higher_is_better)
        for measure in measured(rows)
    ]
    lines = [[label, *(f"{won.get(label, 0):.3g}" for won in points)] for label in config.labels]
    return markdown_table(["method", *_headings(rows)], lines)


def cost_table(config: BenchmarkConfig, rows: Sequence[Row], training: Mapping[str, float]) -> str:
    """What a picture and, in minutes by method, the training of all gates took."""
    memory = any(row.memory is not None for row in rows)
    lines = []
    for label in config.labels:
        mine = of_method(rows, label)
        peak = max((row.memory for row in mine if row.memory is not None), default=None)
        line = [label, number(mean(row.evaluations for row in mine), 0), number(mean(row.seconds for row in mine), 2)]
        line += [number(peak, 0)] if memory else []
        lines.append([*line, number(training.get(label), 1)] if training else line)
    header = ["method", "UNet evaluations", "seconds", *(["memory beyond the weights (MiB)"] if memory else [])]
    drawing = sum(row.seconds or 0 for row in rows) / 60
    total = f"\nDrawing took {drawing:.0f} minutes" + (
        f" and training {sum(training.values()):.0f}" if training else ""
    )
    header += ["training of all its gates (minutes)"] if training else []
    return markdown_table(header, lines) + total + ", summed over processes.\n"


def correlation_table(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    """How well the alignments predict the oracle's truth; empty where there is none."""
    truths = [measure for measure in SHOWN_TRUTHS if measure in measured(rows)]
    if not truths:
        return ""
    means = [line for line in means_by_method(config, rows) if line["pictures"]]
    sides: dict[str, Sequence[Mapping[str, Any]]] = {
        "pictures": [row.numbers for row in rows],
        "means of methods": means,
    }
    lines = []
    for alignment in (measure for measure in ALIGNMENTS if measure in measured(rows)):
        for side, points in sides.items():
            if len(points) < 3:  # two always lie on a line
                continue
            pairs = [
                ([point[alignment.key] for point in points], [point[truth.key] for point in points]) for truth in truths
            ]
            cells = (f"{number(correlation(*pair), 2)} / {number(rank_correlation(*pair), 2)}" for pair in pairs)
            lines.append([alignment.heading, f"{len(points)} {side}", *cells])
    head = (
        "## How far can one trust alignment?\n\nCorrelation with the truth that the oracle sees: Pearson's r / "
        "Spearman's ρ.\n\n"
    )
    return head + markdown_table(["", "over", *(truth.heading for truth in truths)], lines)


def loras_tables(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    """A table for each of the main measures, compositions down and methods across, the best in bold."""
    parts = []
    for measure in (measure for measure in BY_LORAS if measure in measured(rows)):
        lines = []
        for loras, means in means_by_loras(config, rows, measure).items():
            cells = [number(means.get(label)) for label in config.labels]
            best = number(max(means.values()))
            lines.append([loras, *(f"**{cell}**" if cell == best and len(set(cells)) > 1 else cell for cell in cells)])
        title = measure.heading[0].upper() + measure.heading[1:]
        parts.append(f"### {title}\n\n" + markdown_table(["composition", *config.labels], lines))
    return "\n".join(parts)


def failure_table(rows: Sequence[Row]) -> str:
    """Which errors came where, and how often; empty without any."""
    failed = [(row.composition, row.method, row.error) for row in rows if row.error is not None]
    if not failed:
        return ""
    lines = [[*what, str(failed.count(what))] for what in dict.fromkeys(failed)]
    return "## Failed\n\n" + markdown_table(["composition", "method", "error", "pictures"], lines)


def interval(values: tuple[float, float, float]) -> str:
    """A mean with its interval."""
    middle, low, high = values
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"


def _headings(rows: Sequence[Row]) -> list[str]:
    return [measure.heading for measure in measured(rows)]


def _means(rows: Sequence[Row], measures: Sequence[Measure]) -> list[str]:
    return [number(mean_of(rows, measure)) for measure in measures]
