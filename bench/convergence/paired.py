"""What may be said of runs that share seeds: mean and spread, paired differences, Holm's correction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LEVEL = 0.05


class Spread(NamedTuple):
    """`deviation` is the sample's, NaN for one value."""

    mean: float
    deviation: float
    n: int


class Difference(NamedTuple):
    """The mean of first - second over the seeds that both have, half its 95 % interval, and the two-sided p of the paired t test.

    `half_width` and `p` are NaN for fewer than two seeds. Where all differences are equal, `p` is 0, or 1 if they are 0.
    """

    mean: float
    half_width: float
    p: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """From the values by seed; None when they have no seed in common."""
    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    if not differences:
        return None
    mean, deviation, n = spread(differences)
    if n < 2:
        return Difference(mean, math.nan, math.nan, n)
    error = deviation / math.sqrt(n)
    if error == 0.0:
        return Difference(mean, 0.0, float(mean == 0.0), n)
    from scipy import stats  # here: a machine that only trains may lack it

    p = 2.0 * float(stats.t.sf(abs(mean) / error, n - 1))
    return Difference(mean, error * float(stats.t.ppf(1.0 - LEVEL / 2, n - 1)), p, n)


EXTEND_HALF_WIDTH = 0.005


def asks_for_more(difference: Difference) -> bool:
    """The rule for more seeds, applied to FerKD - FKD after five: the interval includes 0 and is too wide to mean "no difference"."""
    return abs(difference.mean) < difference.half_width and difference.half_width > EXTEND_HALF_WIDTH


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given (Holm 1979). Those that are NaN stay so and do not count."""
    known = sorted((p, place) for place, p in enumerate(values) if not math.isnan(p))
    adjusted = [math.nan] * len(values)
    highest = 0.0
    for rank, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = highest
    return adjusted
