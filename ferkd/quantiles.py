"""Thresholds as quantiles: "discard the least confident tenth of the crops" as the probability that this means in a store."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from ferkd.regions import Confidence, RegionPolicy
from ferkd.store import LabelStore

_SHIFT = 8
"""Confidences are counted by their float32 bits without the last 8: steps of 3e-5 of the value or less, and none near 1 is lost."""


def quantile_policy(store: LabelStore, policy: RegionPolicy) -> RegionPolicy:
    """The policy whose thresholds are the probabilities below which the given shares of the store's crops lie.

    discard_below = 0.1 then discards a tenth of the crops, calibrate_below = 0.3 calibrates the next two, discard_above = 0.9 discards the
    most confident tenth. 0 and 1 keep their meaning, nothing and all, and many crops of one confidence fall on one side together. Reads
    the whole store once.
    """
    shares = (policy.discard_below, policy.calibrate_below, policy.discard_above)
    if all(share in (0.0, 1.0) for share in shares):
        return policy
    counts = _count(store, policy.confidence)
    below, calibrate, above = (threshold(counts, share) for share in shares)
    return dataclasses.replace(policy, discard_below=below, calibrate_below=calibrate, discard_above=above)


def quantile_line(policy: RegionPolicy, store: LabelStore) -> str:
    """For people: the probabilities that the quantiles meant."""
    return (
        f"thresholds: discard_below {policy.discard_below:.6g}, calibrate_below {policy.calibrate_below:.6g}, "
        f"discard_above {policy.discard_above:.6g} are these quantiles of {store.source}"
    )


def threshold(counts: npt.NDArray[np.int64], share: float) -> float:
    """The smallest counted probability below which at least `share` of the crops lie; 0 and 1 are themselves."""
    if share in (0.0, 1.0):
        return share
    ends = np.cumsum(counts)
    bin_above = int(np.searchsorted(ends, share * ends[-1])) + 1
    edge = np.array(min(bin_above, len(counts) - 1) << _SHIFT, np.uint32).view(np.float32)
    return min(1.0, float(edge))


def _count(store: LabelStore, confidence: Confidence) -> npt.NDArray[np.int64]:
    last = int(np.float32(1.0).view(np.uint32)) >> _SHIFT
    counts = np.zeros(last + 2, np.int64)
    for _, found in store.confidences(confidence):
        bins = np.ascontiguousarray(np.minimum(found, np.float32(1.0)), np.float32).view(np.uint32).ravel() >> _SHIFT
        np.add.at(counts, bins, 1)
    return counts
