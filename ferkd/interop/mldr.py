"""Reinforced datasets of apple/ml-dr into a store: those whose augmentation is a crop and a flip. docs/formats.md describes the files.

One file an image, `INDEX.pth.tar`, numbered by the image's place in torchvision's ImageFolder, and `config.pth.tar`.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ferkd.crops import CropSettings
from ferkd.errors import InputError
from ferkd.interop.conversion import (
    EQUAL_CROPS,
    ConvertSettings,
    CropLabels,
    Source,
    Unusable,
    checked_labels,
    choose_classes,
    convert,
    labelled_split,
    read_labels,
)
from ferkd.interop.pickles import read_torch_file
from ferkd.sources import Split
from ferkd.store import LabelStore

SUFFIX = ".pth.tar"
CROP, FLIP = "random_resized_crop", "random_horizontal_flip"
ALLOWED = {CROP, FLIP, "uint8", "to_tensor", "normalize"}  # the last three change no pixel that a student would not change itself


@dataclasses.dataclass(frozen=True)
class MlDrSettings(ConvertSettings):
    """SOURCE is the unpacked folder of INDEX.pth.tar and config.pth.tar."""


def convert_mldr(settings: MlDrSettings, say: Callable[[str], None]) -> LabelStore:
    """Converts the reinforcements of every image in settings.data/train. Raises InputError and StoreError as conversion.convert does."""
    split = labelled_split(settings.data)
    config = _config(settings.source)
    has_flip = _augmentations(config, settings.source)
    declared = config.get("num_classes")
    classes = choose_classes(settings, split.folders, declared if isinstance(declared, int) and declared > 1 else None)
    number_of = numbers_in_imagefolder(split)
    there = _numbers_there(settings.source, len(split))

    def path(image: int) -> Path | None:
        number = int(number_of[image])
        return settings.source / f"{number}{SUFFIX}" if there[number] else None

    def why_none(image: int) -> str:
        return f"{number_of[image]}{SUFFIX} ({split.paths[image]}): no such file"

    first = next((image for image in range(len(split)) if path(image) is not None), None)
    if first is None:
        raise InputError(f"{settings.source}: has no labels for any of the {len(split):,} images ({why_none(0)})")
    boxes, _, ids, _ = _samples(read_labels(settings.source / f"{number_of[first]}{SUFFIX}"), int(number_of[first]), has_flip)
    for name, found in (("crops", len(boxes)), ("topk", ids.shape[1])):
        wanted = getattr(settings, name)
        if wanted is not None and wanted > found:
            raise InputError(f"{name}: {wanted}, but {number_of[first]}{SUFFIX} has {found}; choose at most that many")
    reader = _Reader(settings, number_of, len(classes.names), has_flip, len(boxes), ids.shape[1])
    source = Source(
        name="ml-dr",
        files=path,
        why_none=why_none,
        read=reader.read,
        crops=settings.crops or len(boxes),
        k=settings.topk or ids.shape[1],
        crop_settings=CropSettings(flip=has_flip),
        described={"teacher": _text(config.get("teacher")), "dataset": _text(config.get("dataset")), "crops": len(boxes)},
    )
    return convert(settings, split, classes, source, say)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / f"config{SUFFIX}"
    if not file.is_file():
        raise InputError(f"{file}: no such file; give the unpacked folder that holds config{SUFFIX} and 0{SUFFIX}, 1{SUFFIX}, ...")
    config = read_torch_file(file.read_bytes(), str(file))
    if not isinstance(config, dict) or not isinstance(config.get("reinforce"), dict):
        raise InputError(f"{file}: does not describe a reinforced dataset")
    return config


def _augmentations(config: dict[str, Any], folder: Path) -> bool:
    """Whether crops are flipped. Raises InputError for an augmentation that a box and a flip cannot say."""
    steps = config["reinforce"].get("image_augmentation")
    if not isinstance(steps, dict):
        raise InputError(f"{folder / f'config{SUFFIX}'}: names no image_augmentation")
    enabled = {name for name, values in steps.items() if not isinstance(values, dict) or values.get("enable", True)}
    others = sorted(str(name)[:40] for name in enabled - ALLOWED)
    if others or CROP not in enabled:
        what = f"uses {', '.join(others)}" if others else f"has no {CROP}"
        raise InputError(f"{folder}: {what}; a store holds crops and flips only, so convert the set that was made with these alone")
    return FLIP in enabled


def numbers_in_imagefolder(split: Split) -> NDArray[np.int64]:
    """The place [N] of each image in torchvision's ImageFolder: by class folder, then by folder below it, then by file name."""
    order = np.argsort(split.folder_of, kind="stable")
    if any(path.count("/") > 1 for path in split.paths):
        order = np.array(sorted(range(len(split)), key=lambda image: (split.folder_of[image], *os.path.split(split.paths[image]))))
    number_of = np.empty(len(split), np.int64)
    number_of[order] = np.arange(len(split))
    return number_of


def _numbers_there(folder: Path, images: int) -> NDArray[np.bool_]:
    """Which numbers [N] have a file. Raises InputError when there are files of more or fewer images than the dataset has."""
    there = np.zeros(images, np.bool_)
    highest = -1
    for name in os.listdir(folder):
        stem = name.removesuffix(SUFFIX)
        if stem != name and stem.isascii() and stem.isdigit() and str(int(stem)) == stem:
            highest = max(highest, int(stem))
            if int(stem) < images:
                there[int(stem)] = True
    if highest + 1 != images:
        raise InputError(
            f"{folder}: has files up to {highest}{SUFFIX}, so labels of {highest + 1:,} images, and the dataset has {images:,}. ml-dr "
            "numbers images by their place in the sorted dataset, so one image more or less would shift the labels: give the whole dataset"
        )
    return there


def _samples(data: bytes, number: int, has_flip: bool) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[Any], NDArray[Any]]:
    """A file's boxes [M, 4] (left, top, width, height), flips [M], ids [M, k] and probabilities [M, k]. Raises Unusable or CodeInFile."""
    name = f"{number}{SUFFIX}"
    content = read_torch_file(data, name)
    try:
        index, samples = content
        params = [sample["params"] for sample in samples]
        if isinstance(params[0], dict):  # written without ml-dr's `compress`: the second of each pair is of an image to mix with
            params = [[p[CROP][0], *([p[FLIP][0]] if has_flip else [])] for p in params]
        corners = _table([p[0] for p in params])  # top, left, height, width
        flips = [p[1] if has_flip else False for p in params]
        probs = _table([sample["prob"][0] for sample in samples])
        ids = _table([sample["prob"][1] for sample in samples])
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise Unusable(
            f"{name}: is not ml-dr's (number, samples of params and prob) of crops and flips with as many classes each"
        ) from error
    if index != number:
        raise Unusable(f"{name}: says that it is of image {index if isinstance(index, int) else '?'}: it was renamed")
    if corners.shape[1] != 4 or (corners != np.rint(corners)).any() or not all(isinstance(flip, bool) for flip in flips):
        raise Unusable(f"{name}: its crops are not (top, left, height, width) in whole pixels and a flip")
    if ids.shape != probs.shape or not ids.shape[1]:
        raise Unusable(f"{name}: its labels are not as many class ids as probabilities")
    boxes = corners[:, [1, 0, 3, 2]].clip(-1, 1 << 20).astype(np.int64)
    return boxes, np.array(flips, np.bool_), ids, probs


def _table(rows: list[Any]) -> NDArray[np.float64]:
    """Lists of as many numbers each as float64 [rows, numbers]. Raises TypeError or ValueError for anything else, whatever it nests."""
    width = len(rows[0])
    if not all(isinstance(row, (list, tuple)) and len(row) == width for row in rows):
        raise ValueError("rows of unequal length")
    return np.fromiter(itertools.chain.from_iterable(rows), np.float64).reshape(len(rows), width)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads one image's file into boxes and labels."""

    settings: MlDrSettings
    number_of: NDArray[np.int64]
    classes: int
    has_flip: bool
    crops: int
    k: int

    def read(self, image: int, data: bytes, width: int, height: int) -> CropLabels:
        number = int(self.number_of[image])
        name = f"{number}{SUFFIX}"
        boxes, flips, ids, probs = _samples(data, number, self.has_flip)
        wanted = self.settings.crops
        if len(boxes) != self.crops if wanted is None else len(boxes) < wanted:
            raise Unusable(f"{name}: has {len(boxes):,} crops, others {wanted or self.crops:,}; {EQUAL_CROPS}")
        if ids.shape[1] != self.k:
            raise Unusable(f"{name}: has {ids.shape[1]} classes a crop, others {self.k}")
        boxes, flips, ids, probs = boxes[:wanted], flips[:wanted], ids[:wanted], probs[:wanted]
        corner, size = boxes[:, :2], boxes[:, 2:]
        if (corner < 0).any() or (size < 1).any() or (corner + size > (width, height)).any():
            raise InputError(
                f"{name}: a crop reaches outside its photo of {width} x {height} pixels: these are not the photos that were labelled, "
                "or an image was added or removed, which shifts ml-dr's numbers: give the very dataset that was labelled"
            )
        whole, exact = checked_labels(ids, probs, self.classes, self.settings.topk or self.k, name)
        return CropLabels(boxes, flips, whole, exact)


def _text(value: Any, depth: int = 0) -> str:
    """A value of the config as one line, for the manifest."""
    if isinstance(value, dict) and depth < 3:
        return ", ".join(f"{key}={_text(value[key], depth + 1)}" for key in sorted(value, key=str))[:500]
    return str(value)[:200] if isinstance(value, (str, int, float, bool, type(None))) else "?"
