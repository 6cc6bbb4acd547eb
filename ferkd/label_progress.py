"""What people are told of a labelling job: what it will be, how far it is, and what came of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ferkd.devices import device_name
from ferkd.filling import evenly, to_stderr
from ferkd.label_plan import Job
from ferkd.regions import Region, RegionPolicy
from ferkd.store import LabelStore

MEASURE_SECONDS, MEASURE_SHARE = 20.0, 0.03
PLAIN_LINE_SECONDS, TERMINAL_LINE_SECONDS = 30.0, 0.5
FAILURES_SHOWN = 20
QUANTILE_IMAGES = 2000


def describe(job: Job, processes: int = 1) -> Iterator[str]:
    """What is about to be done."""
    plan = job.plan
    kept = "all its classes" if job.classes.choice == "teacher" else "the folders' classes alone"
    shared = f", {processes} processes" if processes > 1 else ""
    yield (
        f"{len(plan.paths) * plan.crops:,} crops ({len(plan.paths):,} photos x {plan.crops}) for {job.teacher.spec} at "
        f"{job.teacher.preprocessing.input_size} px on {device_name(job.device)}{shared}"
    )
    yield (
        f"{plan.image_bytes // plan.crops} bytes a crop (top {plan.k} of {plan.classes:,}: {kept}), "
        f"{in_bytes(len(plan.paths) * plan.image_bytes)} in {job.settings.out}"
    )
    if job.device.type == "cuda" and job.settings.autocast == "none" and not job.settings.tf32:
        yield "the teacher computes in full float32; --tf32 or --autocast bf16 take less time where a GPU has tensor cores"


class Rate:
    """Crops a second. The first batch warms up and is left out."""

    def __init__(self) -> None:
        self.done = 0
        self.started = time.monotonic()
        self._first: tuple[int, float] | None = None

    def at(self, done: int) -> None:
        """So many crops are done by now."""
        if done > self.done and self._first is None:
            self._first = (done, time.monotonic())
        self.done = done

    @property
    def warm(self) -> bool:
        """Whether more than the first batch is done."""
        return self._first is not None and self.done > self._first[0]

    def per_second(self) -> float:
        now = time.monotonic()
        if self._first is not None and self.warm:
            return (self.done - self._first[0]) / max(now - self._first[1], 1e-9)
        return self.done / max(now - self.started, 1e-9)

    def measured(self, total: int) -> bool:
        """Whether enough is done for an estimate: 20 s or 3 % of the work, whichever comes first, and more than the first batch."""
        return time.monotonic() - self.started >= MEASURE_SECONDS or (self.warm and self.done >= MEASURE_SHARE * total)


class Progress:
    """Tells the estimate once there is one, and from time to time how far the work of all processes is."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self.total, self.say = total, say
        self.rate = Rate()
        self.estimated = False
        self.on_terminal = say is to_stderr and sys.stderr.isatty()
        self.told = self.rate.started

    def at(self, done: int) -> None:
        """So many crops are done by now."""
        self.rate.at(done)
        now = time.monotonic()
        if not self.estimated and done < self.total and self.rate.measured(self.total):
            self.estimated = True
            self.say(f"measured {self.rate.per_second():,.0f} crops/s over {now - self.rate.started:.1f} s: {self._to_come()} to come")
            self.told = now
        elif self.estimated and now - self.told >= (TERMINAL_LINE_SECONDS if self.on_terminal else PLAIN_LINE_SECONDS):
            self.told = now
            share = done / self.total
            line = f"{done:,} of {self.total:,} crops ({share:.0%}), {self.rate.per_second():,.0f} crops/s, {self._to_come()} left"
            if self.on_terminal:
                print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
            else:
                self.say(line)

    def _to_come(self) -> str:
        return duration((self.total - self.rate.done) / max(self.rate.per_second(), 1e-9))

    def end_line(self) -> None:
        if self.on_terminal and self.estimated:
            print(file=sys.stderr)


# ---- What came of it


def summary(store: LabelStore, labelled: int, seconds: float) -> dict[str, Any]:
    """A finished store in figures, JSON-able: `labelled` crops took this run `seconds`. Scans the store once for the default policy."""
    manifest = store.manifest
    counts = store.scan(RegionPolicy()).counts
    return {
        "store": str(store.path),
        "images": len(store),
        "crops": len(store) * store.crops,
        "classes": store.classes,
        "k": store.k,
        "bytes": sum(shard.bytes for shard in manifest.shards) + manifest.index.bytes,
        "seconds": round(seconds, 3),
        "labelled_crops": labelled,
        "regions": {region.name.lower(): int(counts[region]) for region in Region},
        "failed": dict(manifest.failed),
    }


def summary_lines(store: LabelStore, figures: dict[str, Any]) -> Iterator[str]:
    """The same for people."""
    yield f"{store.path}: {figures['crops']:,} crops of {figures['images']:,} photos, {in_bytes(figures['bytes'])}"
    if figures["labelled_crops"]:
        rate = figures["labelled_crops"] / max(figures["seconds"], 1e-9)
        yield f"labelled {figures['labelled_crops']:,} crops in {duration(figures['seconds'])} ({rate:,.0f} crops/s)"
    quantiles = confidence_quantiles(store)
    if quantiles is not None:
        yield "confidence (largest probability): " + ", ".join(f"{share:.0%} of crops below {value:.3f}" for share, value in quantiles)
    yield "under the default policy: " + ", ".join(f"{count:,} crops {region}" for region, count in figures["regions"].items())
    failed = figures["failed"]
    if failed:
        yield f"{len(failed):,} photos could not be read and have no labels (manifest.json lists all):"
        for path, reason in list(failed.items())[:FAILURES_SHOWN]:
            yield f"  {path}: {reason}"
        if len(failed) > FAILURES_SHOWN:
            yield f"  and {len(failed) - FAILURES_SHOWN:,} more"


def confidence_quantiles(store: LabelStore) -> list[tuple[float, float]] | None:
    """(share, confidence) at 10, 25, 50, 75 and 90 % of the crops of 2,000 photos spread over the store; None when none was labelled."""
    found = [
        store.unpack(labels.label_words)[1].max(axis=1)
        for image in evenly(len(store), QUANTILE_IMAGES).tolist()
        if (labels := store.read(image)).width > 0
    ]
    if not found:
        return None
    shares = (0.1, 0.25, 0.5, 0.75, 0.9)
    return list(zip(shares, np.quantile(np.concatenate(found), shares).tolist(), strict=True))


def duration(seconds: float) -> str:
    """A time for people: "12 s", "3.4 min", "5.6 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def in_bytes(count: float) -> str:
    """A number of bytes for people: "24.6 kB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
