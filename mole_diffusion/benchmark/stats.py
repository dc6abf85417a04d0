"""Comparing methods on the same prompts and seeds: paired bootstrap, wins, correlations."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from scipy.stats import bootstrap, pearsonr, spearmanr

from mole_diffusion.errors import MoLEError

RESAMPLES = 2000
_BATCH = 200  # of them at a time, so that many pictures fit into memory

Key = TypeVar("Key", bound=Hashable)


def paired_bootstrap(
    ours: Mapping[Key, float], theirs: Mapping[Key, float], *, seed: int = 0
) -> tuple[float, float, float]:
    """Mean difference of two methods over what both have, with its 95 % interval.

    Pairs (the same composition, prompt and seed) are drawn with replacement 2,000 times; the interval is the 2.5th to
    the 97.5th percentile (Efron & Tibshirani, An Introduction to the Bootstrap, 1993).

    Args:
        ours: The number of each picture, by what it shows; see `Row.picture`.
        theirs: The same for the other method.
        seed: Seed of the draws, so that a report comes out the same again.

    Returns:
        Mean of `ours - theirs`, low end, high end.

    Raises:
        MoLEError: They have nothing in common.
    """
    common = [key for key in ours if key in theirs]
    if not common:
        raise MoLEError("the two methods have no picture in common, so there is nothing to pair.")
    differences = np.array([ours[key] - theirs[key] for key in common])
    if len(common) == 1:  # which scipy refuses: every draw is the same
        return (float(differences[0]),) * 3
    found = bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=_BATCH,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(differences.mean()), float(found.low), float(found.high)


def wins(means: Mapping[str, Mapping[str, float]], *, higher_is_better: bool = True) -> dict[str, float]:
    """In how many compositions each method is best; those who tie share the point.

    Args:
        means: The mean of each method, by composition.
        higher_is_better: Whether the highest mean is the best.
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
    return None if _never_changes(x, y) else float(pearsonr(x, y).statistic)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rho: Pearson's r of ranks, those that tie sharing their mean rank; `None` as `correlation`."""
    return None if _never_changes(x, y) else float(spearmanr(x, y).statistic)


def _never_changes(x: Sequence[float], y: Sequence[float]) -> bool:
    return len(x) < 2 or min(x) == max(x) or min(y) == max(y)
