"""Fills a store from labels that exist already (other people's files, other stores): image by image, resumable like any labelling."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ferkd.shards import UNIT_IMAGES, LabelledImage
from ferkd.store import LabelStore, StorePlan, StoreWriter

SAY_SECONDS = 30.0
SHOWN = 20
AGREEMENT_IMAGES = 2000


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def fill_store(
    out: Path, plan: StorePlan, labelled: Callable[[int], LabelledImage], say: Callable[[str], None], threads: int | None = None
) -> LabelStore:
    """Writes what the store `out` misses, asking `labelled` (called from `threads` threads) for each image by its number.

    Whatever `labelled` raises ends the work; what was written stays, and the same call goes on from there. Its answer must depend on
    the image alone, so that an interrupted store ends byte-identical to an uninterrupted one. Raises StoreError as StoreWriter does.
    """
    images, told = len(plan.paths), time.monotonic()
    with StoreWriter(out, plan) as writer, ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1)) as pool:
        todo = writer.missing()
        left = sum(last - first + 1 for _, first, last in todo)
        if left < images:
            say(f"{out}: {images - left:,} of {images:,} images are there already")
        for shard, first, last in todo:
            for start in range(first, last + 1, UNIT_IMAGES):
                unit = list(pool.map(labelled, range(start, min(start + UNIT_IMAGES, last + 1))))
                writer.write_unit(shard, unit, start)
                left -= len(unit)
                if time.monotonic() - told > SAY_SECONDS:
                    told = time.monotonic()
                    say(f"{images - left:,} of {images:,} images")
            writer.finish_shard(shard)
        return writer.finish()


def evenly(count: int, wanted: int) -> NDArray[np.int64]:
    """At most `wanted` of range(count), spread evenly."""
    wanted = min(wanted, count)
    return np.arange(wanted, dtype=np.int64) * count // wanted


def agreement(store: LabelStore) -> float | None:
    """The share of crops whose most probable class is the image's own, over 2,000 images spread over the store; None without labels."""
    found = [
        store.unpack(labels.label_words)[0][:, 0] == labels.target
        for image in evenly(len(store), AGREEMENT_IMAGES).tolist()
        if (labels := store.read(image)).width
    ]
    return float(np.concatenate(found).mean()) if found else None


def say_result(store: LabelStore, say: Callable[[str], None]) -> float | None:
    """Says what a finished store holds, how far it agrees with the class folders (which is returned), and which images failed."""
    m = store.manifest
    size = sum(shard.bytes for shard in m.shards) + m.index.bytes
    say(f"{store.path}: {m.images * m.crops:,} crops of {m.images:,} images, top {m.k} of {m.classes:,}, {size / 1e6:,.1f} MB")
    share = agreement(store)
    if share is not None:
        say(f"the most probable class is the image's own in {share:.1%} of the crops")
    if m.failed:
        say(f"{len(m.failed):,} images have no labels (manifest.json lists all):")
        for path, reason in list(m.failed.items())[:SHOWN]:
            say(f"  {path}: {reason}")
    return share
