"""What a store's crops look like: counted in one reading, under one policy and so finely that every other one can be tried afterwards."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch

from ferkd.regions import Confidence, Region, RegionPolicy, confidence_of, region_of
from ferkd.store import LabelStore

BANDS = 20
"""Confidence bands of a report: [0, 0.05), ..., [0.95, 1]."""

SCALES = (0.0, 0.08, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0)
"""Edges of the bands of crop scale (area of the crop / area of the photograph) in a report."""

THRESHOLDS = tuple(sorted({*(n / 1000 for n in range(1001)), *(n / 10_000 for n in range(10)), *(n / 10_000 for n in range(9991, 10_000))}))
"""The thresholds that can be tried on a counted store besides the policy's own: every thousandth, and finer beside 0 and 1."""

CANDIDATES = tuple(
    (below, calibrate)
    for below in (0.0, 0.05, 0.1, 0.2, 0.3)
    for calibrate in (0.0, 0.15, 0.3, 0.5)
    if calibrate > below or (calibrate == 0.0 < below)
)
"""(discard_below, calibrate_below) of the table of candidates."""

_CHUNK_CROPS = 1 << 16

Ints = npt.NDArray[np.int64]


class ConfidenceCounts:
    """Crops by one kind of confidence, fine enough to apply any policy whose thresholds are among `edges`, exactly.

    `edges` [E] float64 run from 0 to 1. `crops`, `agree` and `images` are int64 [2 E]: place 2 i is a confidence equal to edge i (in
    float32, as thresholds are compared), place 2 i + 1 one between it and the next. `images` counts an image at its most confident crop.
    """

    def __init__(self, confidence: Confidence, thresholds: Sequence[float]) -> None:
        self.confidence = confidence
        distinct, first = np.unique(np.array(sorted(thresholds), np.float32), return_index=True)
        self._edges32 = distinct
        self.edges = np.array(sorted(thresholds))[first]
        self.crops, self.agree, self.images = (np.zeros(2 * len(distinct), np.int64) for _ in range(3))

    def add(self, confidence: npt.NDArray[np.float32], agree: npt.NDArray[np.bool_]) -> None:
        """Count the crops of some images: [images, M] each."""
        size = len(self.crops)
        place = self._place(confidence)
        self.crops += np.bincount(place.ravel(), minlength=size)
        self.agree += np.bincount(place[agree], minlength=size)
        self.images += np.bincount(place.max(axis=1), minlength=size)

    def regions(self, policy: RegionPolicy) -> tuple[Ints, Ints]:
        """Crops, and crops that agree, by Region: [3] each. Raises ValueError for a threshold that is none of the edges."""
        below, calibrate, above = (self._edge(value) for value in (policy.discard_below, policy.calibrate_below, policy.discard_above))
        place = np.arange(len(self.crops))
        region = np.where(place < 2 * calibrate, Region.CALIBRATED, Region.KEPT)
        region[(place < 2 * below) | (place > 2 * above)] = Region.DISCARDED
        counts, agree = (np.bincount(region, weights=of, minlength=3).astype(np.int64) for of in (self.crops, self.agree))
        return counts, agree

    def _place(self, confidence: npt.NDArray[np.float32]) -> Ints:
        right = np.searchsorted(self._edges32, confidence, side="right")
        place = 2 * right - 1 - (self._edges32[right - 1] == confidence)
        places: Ints = np.maximum(place, 0).astype(np.int64)
        return places

    def _edge(self, threshold: float) -> int:
        found = int(np.searchsorted(self._edges32, np.float32(threshold)))
        if found == len(self._edges32) or self._edges32[found] != np.float32(threshold):
            raise ValueError(f"{threshold} is none of the thresholds that were counted")
        return found


@dataclasses.dataclass
class Bands:
    """Crops by band of confidence or of scale: int64 [n] each; `agree`: crops whose most probable class is the ground truth."""

    crops: Ints
    agree: Ints
    confidence: npt.NDArray[np.float64]  # sums

    @classmethod
    def empty(cls, bands: int) -> Bands:
        return cls(np.zeros(bands, np.int64), np.zeros(bands, np.int64), np.zeros(bands))

    def add(self, band: Ints, agree: npt.NDArray[np.bool_], confidence: npt.NDArray[np.float32]) -> None:
        bands = len(self.crops)
        self.crops += np.bincount(band.ravel(), minlength=bands)
        self.agree += np.bincount(band[agree], minlength=bands)
        self.confidence += np.bincount(band.ravel(), confidence.ravel(), minlength=bands)


class Candidate(NamedTuple):
    """What one pair of thresholds would do with one kind of confidence: crops, and crops that agree, by Region."""

    policy: RegionPolicy
    crops: Ints
    agree: Ints


class Inspection:
    """The counts of a store. `regions` and `region_agree` int64 [3], by Region under the policy; `by_confidence` and `by_scale` by its
    confidence; `counts` by each kind of confidence. Images that could not be read when they were labelled are `unreadable` and no more.

    `has_folder`: bool [C], the classes that have a folder.
    """

    def __init__(self, policy: RegionPolicy, has_folder: npt.NDArray[np.bool_]) -> None:
        self.policy, self.has_folder = policy, has_folder
        self._here = 0.0
        self.images = self.images_without_survivor = self.unreadable = 0
        self.by_confidence, self.by_scale = Bands.empty(BANDS), Bands.empty(len(SCALES) - 1)
        own = (policy.discard_below, policy.calibrate_below, policy.discard_above)
        self.counts: dict[Confidence, ConfidenceCounts] = {
            kind: ConfidenceCounts(kind, [*own, *THRESHOLDS] if kind == policy.confidence else THRESHOLDS) for kind in get_args(Confidence)
        }

    @property
    def regions(self) -> Ints:
        return self.counts[self.policy.confidence].regions(self.policy)[0]

    @property
    def region_agree(self) -> Ints:
        return self.counts[self.policy.confidence].regions(self.policy)[1]

    @property
    def crops(self) -> int:
        return int(self.by_scale.crops.sum())

    @property
    def elsewhere(self) -> float:
        """The share of the teacher's probability on classes that have no folder, 0 to 1; the tail counts evenly for those not stored."""
        return 0.0 if self.has_folder.all() else max(0.0, 1.0 - self._here / max(1, self.crops))

    def add(self, ids: Ints, probs: npt.NDArray[np.float32], targets: Ints, scale: npt.NDArray[np.float64]) -> None:
        """Count some images' crops: ids and probs [images, M, k], targets [images], scale [images, M] (area share of each crop)."""
        classes = len(self.has_folder)
        truth = torch.from_numpy(np.broadcast_to(targets[:, None], scale.shape).copy())
        agree = ids[..., 0] == targets[:, None]
        for kind, counts in self.counts.items():
            confidence = confidence_of(torch.from_numpy(ids), torch.from_numpy(probs), truth, classes, kind)
            counts.add(confidence.numpy(), agree)
            if kind == self.policy.confidence:
                region = region_of(confidence, self.policy).numpy()
                self.images_without_survivor += int((region == Region.DISCARDED).all(axis=1).sum())
                chosen = confidence.numpy()
        self.images += len(targets)
        if not self.has_folder.all():
            is_here = self.has_folder[ids]
            stored = np.where(is_here, probs, 0.0).sum(-1, dtype=np.float64)
            tail = np.maximum(1.0 - probs.sum(-1, dtype=np.float64), 0.0)
            left = np.maximum(int(self.has_folder.sum()) - is_here.sum(-1), 0) / max(1, classes - ids.shape[-1])
            self._here += float((stored + tail * left).sum())
        self.by_confidence.add((chosen * BANDS).astype(np.int64).clip(0, BANDS - 1), agree, chosen)
        self.by_scale.add(np.searchsorted(SCALES[1:-1], scale, side="right"), agree, chosen)

    def candidates(self, kind: Confidence) -> Iterator[Candidate]:
        """What each of CANDIDATES would discard, calibrate and keep by this kind of confidence."""
        for below, calibrate in CANDIDATES:
            policy = RegionPolicy(discard_below=below, calibrate_below=calibrate, confidence=kind)
            yield Candidate(policy, *self.counts[kind].regions(policy))

    def as_json(self) -> dict[str, Any]:
        """The counts for programs."""
        policy = self.policy
        return {
            "images": self.images, "images_without_survivor": self.images_without_survivor, "images_unreadable": self.unreadable,
            "crops": self.crops, "policy": dataclasses.asdict(policy), "elsewhere": round(self.elsewhere, 6),
            "regions": _by_region(self.regions), "region_agree": _by_region(self.region_agree),
            "band_crops": self.by_confidence.crops.tolist(), "band_agree": self.by_confidence.agree.tolist(),
            "scale_edges": list(SCALES), "scale_crops": self.by_scale.crops.tolist(), "scale_agree": self.by_scale.agree.tolist(),
            "candidates": [
                {"confidence": kind, "discard_below": policy.discard_below, "calibrate_below": policy.calibrate_below,
                 "regions": _by_region(crops), "region_agree": _by_region(agree)}
                for kind in self.counts for policy, crops, agree in self.candidates(kind)
            ],
        }  # fmt: skip


def inspect_store(store: LabelStore, policy: RegionPolicy, progress: Callable[[int], None] | None = None) -> Inspection:
    """Read every stored label once and count. Memory does not depend on the store's size.

    `progress` is called with the number of images done. Raises StoreError for labels that were changed.
    """
    has_folder = np.zeros(store.classes, bool)
    has_folder[list(store.folders.values())] = True
    inspection = Inspection(policy, has_folder)
    m, numbers = store.crops, np.arange(store.crops)
    step = max(1, _CHUNK_CROPS // m)
    words = np.empty((step, m, store.label_width), np.uint32)
    scale, targets = np.empty((step, m)), np.empty(step, np.int64)
    for first in range(0, len(store), step):
        n = 0
        for image in range(first, min(first + step, len(store))):
            labels = store.read(image)
            if labels.width == 0:
                inspection.unreadable += 1
                continue
            boxes, _ = labels.boxes(numbers)
            words[n], targets[n] = labels.label_words, labels.target
            scale[n] = boxes[:, 2].astype(np.float64) * boxes[:, 3] / (labels.width * labels.height)
            n += 1
        if n:
            ids, probs = store.unpack(words[:n].reshape(-1, store.label_width))
            inspection.add(ids.reshape(n, m, -1), probs.reshape(n, m, -1), targets[:n], scale[:n])
        if progress:
            progress(min(first + step, len(store)))
    return inspection


def say_progress(images: int, every: float = 10.0) -> Callable[[int], None]:
    """Says on stderr, every so many seconds, how far the reading of `images` images is; nothing of a short one."""
    last = time.monotonic()

    def progress(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            last = time.monotonic()
            print(f"read the labels of {done:,} of {images:,} images", file=sys.stderr, flush=True)

    return progress


def sample_images(store: LabelStore, images: int) -> list[int]:
    """Up to `images` readable images, evenly spread over the store."""
    spread = np.linspace(0, len(store) - 1, min(images, len(store))).round().astype(int)
    return [int(image) for image in spread if store.entry(int(image)).width]


def sample_crops(confidence: npt.NDArray[np.float32], crops: int) -> Ints:
    """Up to `crops` of an image's crops, evenly spread from its least to its most confident one; confidence [M]."""
    order = np.argsort(confidence, kind="stable")
    chosen: Ints = order[np.linspace(0, len(order) - 1, min(crops, len(order))).round().astype(np.int64)]
    return chosen


def _by_region(counts: Ints) -> dict[str, int]:
    return {region.name.lower(): int(count) for region, count in zip(Region, counts, strict=True)}
