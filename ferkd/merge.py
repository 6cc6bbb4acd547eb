"""Averages stores over the same crops into one: an ensemble of teachers, each of which labelled the crops by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from ferkd.errors import InputError
from ferkd.filling import fill_store, say_result
from ferkd.records import pack_boxes, pack_labels
from ferkd.store import ImageLabels, LabelledImage, LabelStore, StorePlan

COMPARED = 1 << 24  # pairs of class ids at a time


@dataclasses.dataclass(frozen=True)
class MergeSettings:
    """STORE STORE... OUT."""

    stores: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="STORE STORE... OUT")]
    """Two or more stores over the same crops, and last the new store's folder."""
    topk: int | None = None
    """Classes kept for each crop. Default: as many as the store with the most."""
    workers: int | None = None
    """Threads. Default: one a core, at most 16."""

    def __post_init__(self) -> None:
        if len(self.stores) < 3:
            raise InputError(f"stores: {len(self.stores)} folders; give two stores or more to average, and last the folder of the new one")
        for name in ("topk", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: {value}; give a whole number of at least 1")


def merge(settings: MergeSettings, say: Callable[[str], None]) -> LabelStore:
    """Averages all but the last of settings.stores into the last, which may be one that the same call began.

    A class that a store does not name counts with its even share of that store's tail; the most probable classes of the average are kept.
    Raises InputError when the stores are not over the same crops (it says what differs, and nothing is written), StoreError as
    LabelStore and StoreWriter do.
    """
    *sources, out = settings.stores
    if out.resolve() in {source.resolve() for source in sources}:
        raise InputError(f"{out}: is one of the stores to average; the new store needs a folder of its own, named last")
    stores = [LabelStore(source) for source in sources]
    check_same_crops(stores, say)
    first = stores[0]
    most = max(store.k for store in stores)
    k = settings.topk or most
    if k > most:
        raise InputError(f"topk: {k}, but no store has more than {most} classes a crop; choose at most that many")
    replayed = all(store.box_codec == "replayed" for store in stores)
    plan = StorePlan(
        paths=first.paths,
        targets=first.targets.astype(np.int64),
        crops=first.crops,
        k=k,
        class_names=first.class_names,
        folders=first.folders,
        box_codec="replayed" if replayed else "stored",
        label_codec="packed" if all(store.label_codec == "packed" for store in stores) else "half",
        crop_settings=first.crop_settings,
        batch_size=first.manifest.batch_size,
        temperature=first.manifest.temperature,
        provenance={
            "merged_from": [
                {"manifest_sha256": store.manifest_sha256, "k": store.k, "provenance": dict(store.manifest.provenance)} for store in stores
            ],
            **{name: first.manifest.provenance[name] for name in ("decoder", "resampler", "source") if name in first.manifest.provenance},
        },
    )
    say(f"{len(stores)} stores, {len(first):,} images x {first.crops} crops, {plan.image_bytes // plan.crops} bytes a crop, into {out}")

    def labelled(image: int) -> LabelledImage:
        read = [store.read(image) for store in stores]
        for store, labels in zip(stores, read, strict=True):
            if labels.width == 0:
                reason = store.manifest.failed.get(labels.path, "no reason given")
                return LabelledImage(0, 0, 0, None, None, reason)
        answers = [store.unpack(labels.label_words) for store, labels in zip(stores, read, strict=True)]
        ids, probs = average(answers, plan.classes, k)
        boxes = None if replayed else pack_boxes(*read[0].boxes(np.arange(plan.crops)))
        words = pack_labels(ids, probs, plan.label_codec, plan.classes)
        return LabelledImage(read[0].width, read[0].height, read[0].photo_crc, boxes, words)

    store = fill_store(out, plan, labelled, say, settings.workers)
    say_result(store, say)
    return store


def average(
    answers: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]], classes: int, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k most probable classes [M, k] of the mean of labels (ids [M, k_s], probs [M, k_s]), and their probabilities.

    k is at most the largest k_s. In float64; the order of the labels does not matter but for ties.
    """
    rows = max(1, COMPARED // (sum(ids.shape[1] for ids, _ in answers) ** 2))
    parts = [
        _average([(ids[at : at + rows], probs[at : at + rows]) for ids, probs in answers], classes, k)
        for at in range(0, len(answers[0][0]), rows)
    ]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([probs for _, probs in parts])


def _average(
    answers: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]], classes: int, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    everyone = np.concatenate([ids for ids, _ in answers], axis=1)  # [M, K], the classes that anybody names
    total = np.zeros(everyone.shape)
    for ids, probs in answers:
        exact = probs.astype(np.float64)
        share = np.maximum(0.0, 1.0 - exact.sum(axis=1)) / max(classes - ids.shape[1], 1)
        named = everyone[:, :, None] == ids[:, None, :]  # [M, K, k_s]
        total += np.where(named.any(axis=2), np.where(named, exact[:, None, :], 0.0).sum(axis=2), share[:, None])
    again = (everyone[:, :, None] == everyone[:, None, :]) & np.tri(everyone.shape[1], k=-1, dtype=np.bool_)
    total[again.any(axis=2)] = 0.0  # a class counts where it is named first
    mean = np.minimum(total / len(answers), 1.0)
    best = np.lexsort((everyone, -mean), axis=1)[:, :k]
    return np.take_along_axis(everyone, best, 1), np.take_along_axis(mean, best, 1)


# ---- Are they over the same crops? ---------------------------------------------------------------------------------------------


def check_same_crops(stores: Sequence[LabelStore], say: Callable[[str], None]) -> None:
    """Raises InputError, saying what differs, unless all stores have the first one's images, classes and crops, box for box."""
    first = stores[0]
    for other in stores[1:]:
        for what in _differences(first, other):
            raise InputError(
                f"{other.path}: cannot be averaged with {first.source}: {what}; label the same crops with ferkd label --like {first.source}"
            )
    if any(store.box_codec == "stored" for store in stores):  # otherwise they are drawn alike
        say(f"comparing the boxes of {len(first):,} images")
        for image in range(len(first)):
            _check_boxes([(store, labels) for store in stores if (labels := store.read(image)).width])


def _differences(first: LabelStore, other: LabelStore) -> Iterator[str]:
    """What keeps two stores from being averaged, as far as their manifests and indexes tell."""
    for what, mine, theirs in (
        ("images", len(first), len(other)),
        ("crops an image", first.crops, other.crops),
        ("classes", first.classes, other.classes),
        ("temperature", first.manifest.temperature, other.manifest.temperature),
        ("EXIF orientation applied", first.exif_applied, other.exif_applied),
    ):
        if mine != theirs:
            yield f"{what}: {theirs} there, {mine} here"
    if first.manifest.dataset["paths_sha256"] != other.manifest.dataset["paths_sha256"]:
        odd = next(i for i in range(min(len(first), len(other))) if first.paths.raw(i) != other.paths.raw(i))
        yield f"image {odd} is {other.paths[odd]} there and {first.paths[odd]} here"
    if first.class_names != other.class_names:
        odd = next(i for i in range(first.classes) if first.class_names[i] != other.class_names[i])
        yield f"class {odd} is {other.class_names[odd]!r} there and {first.class_names[odd]!r} here"
    if first.manifest.dataset["targets_sha256"] != other.manifest.dataset["targets_sha256"]:
        odd = int(np.flatnonzero(first.targets != other.targets)[0])
        yield f"{first.paths[odd]} has class {other.targets[odd]} there and {first.targets[odd]} here"
    if first.box_codec == other.box_codec == "replayed" and first.crop_settings != other.crop_settings:
        yield f"crops were drawn with {other.crop_settings} there and {first.crop_settings} here"
    for image in range(len(first)):
        here, there = first.entry(image), other.entry(image)
        if here.width and there.width and here[2:] != there[2:]:
            yield f"{here.path}: was another photo when it was labelled there"


def _check_boxes(read: Sequence[tuple[LabelStore, ImageLabels]]) -> None:
    """Raises InputError unless an image's boxes and flips are the same in all stores that have its labels."""
    if len(read) < 2:
        return
    (first, labels), *others = read
    crops = np.arange(first.crops)
    boxes, flips = labels.boxes(crops)
    for store, compared in others:
        their_boxes, their_flips = compared.boxes(crops)
        odd: NDArray[Any] = np.flatnonzero((boxes != their_boxes).any(axis=1) | (flips != their_flips))
        if len(odd):
            crop = int(odd[0])
            raise InputError(
                f"{store.source}: cannot be averaged with {first.source}: crop {crop} of {labels.path} is {their_boxes[crop].tolist()}"
                f"{' flipped' * bool(their_flips[crop])} there and {boxes[crop].tolist()}{' flipped' * bool(flips[crop])} here "
                f"(left, top, width, height); label the same crops with ferkd label --like {first.source}"
            )
