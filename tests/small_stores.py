"""Small stores for tests: made without a teacher, the same bytes every time."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from ferkd.crops import DECODER, RESAMPLER, CropSettings, draw_crops
from ferkd.records import pack_boxes, pack_labels
from ferkd.store import LabelledImage, LabelStore, PathTable, StorePlan, StoreWriter

WIDTH, HEIGHT = 300, 200


def small_plan(images=150, crops=4, k=3, classes=10, box_codec="stored", label_codec="half", **changes):
    """A plan of `images` images in three folders; further keywords replace fields."""
    plan = StorePlan(
        paths=PathTable.from_paths(f"c{i % 3}/image{i:05d}.jpg" for i in range(images)),
        targets=np.arange(images) % classes,
        crops=crops,
        k=k,
        class_names=[f"class {i}" for i in range(classes)],
        folders={"c0": 0, "c1": 1, "c2": 2},
        box_codec=box_codec,
        label_codec=label_codec,
        crop_settings=CropSettings(seed=1),
        batch_size=32,
        temperature=1.0,
        provenance={"teacher": "none", "decoder": DECODER, "resampler": RESAMPLER, "device": "a cpu", "software": {"torch": "2.14"}},
    )
    return dataclasses.replace(plan, **changes)


def labelled(plan, image):
    """The answer for one image of a plan, a function of its number and the plan's form only; every 50th could not be read."""
    return _labelled(image, plan.crops, plan.k, plan.classes, plan.box_codec, plan.label_codec, plan.crop_settings)


@functools.lru_cache(maxsize=4096)  # the tests that kill a labeller at every step label the same images hundreds of times
def _labelled(image, crops, k, classes, box_codec, label_codec, crop_settings):
    if image % 50 == 7:
        return LabelledImage(0, 0, 0, None, None, f"image {image} cannot be decoded")
    rng = np.random.default_rng(image)
    ids = np.argsort(rng.random((crops, classes)), axis=1)[:, :k]
    probs = rng.dirichlet(np.full(k + 1, 0.3), size=crops)[:, :k].astype(np.float32)
    boxes = pack_boxes(*draw_crops(crop_settings, image, np.arange(crops), WIDTH, HEIGHT)) if box_codec == "stored" else None
    return LabelledImage(WIDTH, HEIGHT, image, boxes, pack_labels(ids, probs, label_codec, classes))


def write_missing(writer, answers=labelled):
    """Writes all that a StoreWriter misses and finishes the store."""
    for shard, first, last in writer.missing():
        for start in range(first, last + 1, 64):
            writer.write_unit(shard, [answers(writer.plan, i) for i in range(start, min(start + 64, last + 1))])
        writer.finish_shard(shard)
    return writer.finish()


def make_store(path, plan) -> LabelStore:
    """The finished store of a plan."""
    with StoreWriter(path, plan) as writer:
        return write_missing(writer)


def files_of(path):
    """Every file below a folder, name -> bytes."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(Path(path).rglob("*")) if file.is_file()}
