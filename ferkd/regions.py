"""Which crops to drop, which to correct and which to trust: FerKD's rule (arXiv 2312.17473), chosen at training time.

The paper's thresholds T_L, T_M, T_T and its epsilon are `discard_below`, `calibrate_below`, `discard_above` and
`smoothing` here. Their published values are not known to us, and in our experiments tuned thresholds were better than none
beyond noise in one of eight comparisons on CIFAR-10, by 0.4 points, and by 4 points where most of the teacher's classes do
not occur, which leaving those out mends as well (docs/results.md, "Does FerKD's rule help?"), so the defaults switch the rule off.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ferkd.errors import InputError

Confidence = Literal["max", "target"]


class Region(enum.IntEnum):
    """What becomes of a crop. The values are what the kernels write.

    Code that may be compiled compares with `tensor.eq(Region.KEPT)`: torch.compile takes `tensor == Region.KEPT` for the constant False.
    """

    DISCARDED = 0
    CALIBRATED = 1
    KEPT = 2


@dataclasses.dataclass(frozen=True)
class RegionPolicy:
    """The thresholds that place a crop in a region. The default keeps every crop as the teacher labelled it.

    A crop whose confidence is below `discard_below` or above `discard_above` is discarded; otherwise, below
    `calibrate_below`, its label becomes the ground truth softened by `smoothing`: 1 - smoothing on it and
    smoothing / (C - 1) elsewhere; the rest keep the teacher's label. All are probabilities in [0, 1], compared in float32
    (float64 where the teacher's probabilities are float64).

    `confidence` is the largest stored probability (`max`) or the ground-truth class's (`target`: the tail's equal share,
    max(0, 1 - sum) / (C - k), when it is not among the k stored classes).

    Raises InputError (a ValueError) when a threshold is outside [0, 1] or the thresholds are out of order.
    `calibrate_below` = 0 means that nothing is calibrated and needs no order.
    """

    discard_below: float = 0.0
    """Drop crops of less confidence than this (the paper's T_L)."""
    calibrate_below: float = 0.0
    """Of the others, give those below this the softened ground truth (T_M)."""
    discard_above: float = 1.0
    """Drop crops of more confidence than this (T_T)."""
    smoothing: float = 0.1
    """What the softened ground truth spreads over the other classes; of calibrated crops, and of hard labels."""
    confidence: Confidence = "max"
    """What places a crop: the teacher's largest probability, or that of the ground truth."""

    def __post_init__(self) -> None:
        for name in ("discard_below", "calibrate_below", "discard_above", "smoothing"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or not 0.0 <= value <= 1.0:
                raise InputError(f"{name}: {value!r} is not a probability; give a number from 0 to 1")
        if self.confidence not in get_args(Confidence):
            raise InputError(f"confidence: {self.confidence!r} is unknown; choose 'max' or 'target'")
        if 0.0 < self.calibrate_below < self.discard_below:
            raise InputError(
                f"calibrate_below: {self.calibrate_below} is below discard_below {self.discard_below}, so nothing could be calibrated; "
                "order them discard_below <= calibrate_below <= discard_above, or set calibrate_below to 0"
            )
        if self.discard_above < max(self.discard_below, self.calibrate_below):
            raise InputError(
                f"discard_above: {self.discard_above} is below {max(self.discard_below, self.calibrate_below)}, the lower thresholds; "
                "order them discard_below <= calibrate_below <= discard_above"
            )

    @property
    def discards(self) -> bool:
        """Whether any crop could be discarded under this policy."""
        return self.discard_below > 0.0 or self.discard_above < 1.0

    def fingerprint(self) -> str:
        """16 hexadecimal digits that name what decides a crop's region (smoothing does not)."""
        deciding = {k: v for k, v in dataclasses.asdict(self).items() if k != "smoothing"}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


def confidence_of(ids: Tensor, probs: Tensor, target: Tensor | None, classes: int, confidence: Confidence) -> Tensor:
    """The confidence of each crop, shape [B], from the stored answer: ids [B, k] integer, probs [B, k] floating, target [B] int64.

    `target` may be None when `confidence` is "max". Repeated ids add up. Computed in float32 (float64 for float64 probs).
    """
    probs = probs if probs.dtype == torch.float64 else probs.float()
    if confidence == "max":
        return probs.amax(dim=-1)
    if target is None:
        raise InputError("target: None, but confidence 'target' needs the ground truth of every crop")
    k = ids.shape[-1]
    is_target = ids == target[..., None]
    tail_share = (1.0 - sum_in_order(probs)).clamp_min(0.0) / max(classes - k, 1)
    return torch.where(is_target.any(dim=-1), sum_in_order(torch.where(is_target, probs, 0.0)), tail_share)


def sum_in_order(probs: Tensor) -> Tensor:
    """The sum over the last dimension, added from first to last as every kernel adds it.

    torch.sum may add in another order, and a last bit decides a region when a confidence lies on a threshold.
    """
    total = torch.zeros_like(probs[..., 0])
    for j in range(probs.shape[-1]):
        total = total + probs[..., j]
    return total


def region_of(confidence: Tensor, policy: RegionPolicy) -> Tensor:
    """Which region each crop falls in: an int8 tensor of Region values shaped like `confidence`. NaN confidence is kept."""
    # Thresholds are compared in the confidence's own precision, float32 but for float64 probabilities: a stored 0.3 is never below 0.3.
    # Filled where they are needed: torch.tensor would wait for a GPU.
    below, calibrate, above = (
        torch.full((), value, dtype=confidence.dtype, device=confidence.device)
        for value in (policy.discard_below, policy.calibrate_below, policy.discard_above)
    )
    region = torch.full_like(confidence, Region.KEPT, dtype=torch.int8)
    region[confidence < calibrate] = Region.CALIBRATED
    region[(confidence < below) | (confidence > above)] = Region.DISCARDED  # last: discarding wins
    return region
