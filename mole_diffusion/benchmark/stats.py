"""Comparing methods on the same prompts and seeds: paired bootstrap, wins, correlations."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from mole_diffusion.errors import MoLEError

RESAMPLES = 2000

Key = TypeVar("Key", bound=Hashable)


def paired_bootstrap(
    ours: Mapping[Key, float], theirs: Mapping[Key, float], *, seed: int = 0
) -> tuple[float, float, float]:
    """Mean difference of two methods over what both have, with its 95 % interval.

    Pairs (the same composition, prompt and seed) are drawn with replacement 2,000 times; the interval is the 2.5th to
    the 97.5th percentile (Efron & Tibshirani, An Introduction to the Bootstrap, 1993).

    Args:
        ours: What was drawn to its number.
        theirs: The same of the other method.
        seed: Of the draws, so that a report comes out the same again.

    Returns:
        Mean of `ours - theirs`, low end, high end.

    Raises:
        ValueError: They have nothing in common.
    """
    common = [key for key in ours if key in theirs]
    if not common:
        raise MoLEError("the two methods have no picture in common, so there is nothing to pair.")
    differences = np.array([ours[key] - theirs[key] for key in common])
    rng = np.random.default_rng(seed)
    means = [differences[rng.integers(len(common), size=len(common))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def wins(means: Mapping[str, Mapping[str, float]], *, higher_is_better: bool = True) -> dict[str, float]:
    """In how many compositions each method is best; those who tie share the point.

    Args:
        means: Composition to method to mean.
    """
    points: dict[str, float] = {}
    for by_method in means.values():
        for method in by_method:
            points.setdefault(method, 0.0)
        best = (max if higher_is_better else min)(by_method.values())
        winners = [method for method, value in by_method.items() if value == best]
        for method in winners:
            points[method] += 1 / len(winners)
    return points


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r, or `None` where one of the two never changes."""
    if len(x) < 2 or min(x) == max(x) or min(y) == max(y):
        return None
    return float(np.corrcoef(x, y)[0, 1])


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rho: Pearson's r of ranks, those that tie sharing their mean rank; `None` as :func:`correlation`."""
    return correlation(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float]) -> list[float]:
    _, places, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return [float(rank) for rank in (last - (counts - 1) / 2)[places]]
