"""The statistics of a report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95
FEWEST = 3
"""Pairs below which no test concludes anything: with two, one degree of freedom is left."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; `half` is half the width of its confidence interval, None for one seed."""

    mean: float
    half: float | None
    n: int


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean of differences between runs of the same seed; `p` of the paired t-test, or None."""

    p: float | None = None


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and 95 % t interval of independent values; None without values."""
    if not values:
        return None
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Estimate(mean, None, n)
    error = statistics.stdev(values) / math.sqrt(n)
    return Estimate(mean, float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error, n)


def difference(ours: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """Mean of ours - base over the seeds that both have; None without any.

    There is no test of a single pair, nor of differences that are all the same up to rounding.
    """
    seeds = sorted(ours.keys() & base.keys())
    gaps = estimate([ours[seed] - base[seed] for seed in seeds])
    if gaps is None:
        return None
    if gaps.half is None or gaps.half < 1e-9:
        return Difference(gaps.mean, gaps.half, gaps.n)
    p = stats.ttest_rel([ours[s] for s in seeds], [base[s] for s in seeds]).pvalue
    return Difference(gaps.mean, gaps.half, gaps.n, float(p))


def holm(ps: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that below 0.05 one in twenty such tables errs at all.

    Holm's step-down method (Scand. J. Statist. 6, 1979).
    """
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def verdict(gap: Difference, p: float | None) -> str:
    """The conclusion from a difference, given its p-value adjusted for all tests made."""
    if gap.n < FEWEST:
        return f"too few pairs to conclude ({gap.n})"
    if p is None:
        return "no test: every pair differs by the same"
    if p < 1 - LEVEL:
        return "higher" if gap.mean > 0 else "lower"
    return "not told apart"
