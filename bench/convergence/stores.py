"""The experiments' label stores. A teacher labels a source's images once; every other store is read from that one.

A teacher's answers do not depend on the ground truth, nor on how many crops or classes are kept. So labels of images with wrong
ground truth, of fewer images, of fewer or larger crops, of smaller k, or in the other codec are copied out of the first store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from bench.convergence.datasets import Images
from ferkd.errors import StoreError
from ferkd.records import pack_boxes, pack_labels
from ferkd.shards import UNIT_IMAGES, LabelledImage
from ferkd.sources import scan_split
from ferkd.store import LabelStore, StorePlan, StoreWriter


@dataclasses.dataclass(frozen=True)
class Labelling:
    """One run of `ferkd label`: `crops` crops of at least `min_scale` of every train image, `topk` classes of each answer."""

    teacher: str
    """A name in settings.TEACHERS."""
    images: Images
    crops: int
    min_scale: float
    topk: int = 10
    flags: tuple[str, ...] = ()
    """Further flags of `ferkd label`."""

    @property
    def name(self) -> str:
        flags = "".join(f"-{flag.lstrip('-')}" for flag in self.flags)
        return f"{self.images.name}-{self.teacher}-{self.crops}x{self.min_scale:g}{flags}"


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of `images` that a run learns from: of a labelling the first `crops` crops of at least `min_scale`, and `k` classes."""

    labelling: Labelling
    images: Images
    crops: int
    min_scale: float
    k: int = 5
    codec: Literal["half", "packed"] = "half"

    @property
    def name(self) -> str:
        flags = "".join(f"-{flag.lstrip('-')}" for flag in self.labelling.flags)
        return f"{self.images.name}-{self.labelling.teacher}-{self.crops}x{self.min_scale:g}-k{self.k}-{self.codec}{flags}"


def derive(labels: Labels, labelled: LabelStore, data: Path, out: Path) -> LabelStore:
    """The store `out` of the images in DATA/train, their answers taken from `labelled` by the images' names; goes on where it was killed.

    An image with fewer than `labels.crops` crops of `labels.min_scale` repeats those it has. Raises StoreError for an image that is not
    in `labelled`, or has no such crop.
    """
    split = scan_split(data, "train")
    number_of = {Path(path).name: number for number, path in enumerate(labelled.paths)}
    if len(number_of) < len(labelled):
        raise StoreError(
            f"{labelled.path}: {len(labelled) - len(number_of):,} images share a name with another, so labels cannot be found by it"
        )
    unknown = [path for path in split.paths if Path(path).name not in number_of]
    if unknown:
        raise StoreError(f"{labelled.path}: has no labels of {len(unknown):,} images of {split.photos.root}, such as {unknown[0]}")
    settings = dataclasses.replace(labelled.crop_settings, scale=(labels.min_scale, labelled.crop_settings.scale[1]))
    provenance = {
        **labelled.manifest.provenance,
        "dataset_fingerprint": split.fingerprint(),
        "derived": {"from": labelled.manifest_sha256, "crops": labels.crops, "min_scale": labels.min_scale, "k": labels.k},
    }
    plan = StorePlan(
        paths=split.paths,
        targets=np.array([labelled.folders[folder] for folder in split.folders])[split.folder_of],
        crops=labels.crops,
        k=labels.k,
        class_names=labelled.class_names,
        folders={folder: labelled.folders[folder] for folder in split.folders},
        box_codec="stored",
        label_codec=labels.codec,
        crop_settings=settings,
        batch_size=labelled.manifest.batch_size,
        temperature=labelled.manifest.temperature,
        provenance=provenance,
    )

    def images(first: int, last: int) -> Iterator[LabelledImage]:
        for image in range(first, last + 1):
            yield _copied(labels, labelled, number_of[Path(split.paths[image]).name])

    with StoreWriter(out, plan) as writer:
        for shard, first, last in writer.missing():
            for start in range(first, last + 1, UNIT_IMAGES):
                writer.write_unit(shard, list(images(start, min(start + UNIT_IMAGES - 1, last))))
            writer.finish_shard(shard)
        return writer.finish()


def _copied(labels: Labels, labelled: LabelStore, number: int) -> LabelledImage:
    """One image's chosen crops and classes, packed anew."""
    image = labelled.read(number)
    if image.width == 0:
        return LabelledImage(0, 0, image.photo_crc, None, None, labelled.manifest.failed[image.path])
    boxes, flips = image.boxes(np.arange(labelled.crops))
    if labels.min_scale > labelled.crop_settings.scale[0]:
        large = np.flatnonzero(boxes[:, 2].astype(np.int64) * boxes[:, 3] >= labels.min_scale * image.width * image.height)
    else:  # the draws' own bound: rounding to pixels may leave a crop just below it
        large = np.arange(labelled.crops)
    if len(large) == 0:
        raise StoreError(f"{labelled.path}: {image.path} has no crop of at least {labels.min_scale:g} of it; label more crops")
    chosen = np.resize(large, labels.crops)
    ids, probs = labelled.unpack(image.label_words[chosen])
    words = pack_labels(ids[:, : labels.k], probs[:, : labels.k], labels.codec, labelled.classes)
    return LabelledImage(image.width, image.height, image.photo_crc, pack_boxes(boxes[chosen], flips[chosen]), words)
