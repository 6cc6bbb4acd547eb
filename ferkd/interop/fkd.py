"""FKD's label files (szq0214/FKD) into a store. docs/formats.md describes them.

One file an image, `train/CLASS/IMAGE.tar`: what torch.save made of [coords, flips, labels], and no tar archive.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
    name_hashes,
    read_labels,
)
from ferkd.interop.pickles import Array, DamagedFile, read_torch_file
from ferkd.records import MAX_SIDE
from ferkd.store import LabelStore, PathTable

LabelType = Literal["hard", "smoothing", "marginal_smoothing_k5", "marginal_smoothing_k10", "marginal_renorm_k5", "dense"]
HALF_IDS = 2048  # float16 counts exactly up to here
DENSE_TOPK = 5
FIRST_FILES = 100  # among which one must be readable to know what the files hold


@dataclasses.dataclass(frozen=True)
class FkdSettings(ConvertSettings):
    """SOURCE is the folder that FKD's --softlabel_path names, or the one that its generator's --save_path named."""

    label_type: LabelType | Literal["auto"] = "auto"
    """FKD's name for what the files hold; `auto` tells by their shape. Both k5 types have the same files."""


def convert_fkd(settings: FkdSettings, say: Callable[[str], None]) -> LabelStore:
    """Converts FKD's files of every image in settings.data/train. Raises InputError and StoreError as conversion.convert does."""
    split = labelled_split(settings.data)
    classes = choose_classes(settings, split.folders)
    folder = _folder_of_train(settings.source)
    files = _Files(folder, split.paths)
    form = _form_of(settings, files, len(split), len(classes.names))
    for line in files.unused():
        say(line)
    reader = _Reader(settings, form, len(classes.names), files, say)
    source = Source(
        name="fkd",
        files=files.path,
        why_none=files.why_none,
        read=reader.read,
        crops=form.crops if settings.crops is None else settings.crops,
        k=form.k,
        crop_settings=CropSettings(),
        described={"label_type": form.label_type, "precision": form.precision, "crops": form.crops},
    )
    store = convert(settings, split, classes, source, say)
    reader.say_what_was_odd()
    return store


# ---- Which file belongs to which image -----------------------------------------------------------------------------------------


def trainer_name(path: str) -> str:
    """Where FKD's training script looks for the labels of train/`path`: its last three parts, cut at the first dot anywhere in them."""
    return "/".join(f"train/{path}".split("/")[-3:]).split(".")[0] + ".tar"


def generator_name(path: str) -> str:
    """Where FKD's generator writes them: only the file's name is cut at its first dot."""
    folder, _, name = f"train/{path}".rpartition("/")
    return f"{folder}/{name.split('.')[0]}.tar"


class FileNames:
    """The file of every image of `paths` by one of these rules. `shared`: the images that would share theirs, `a.1.jpg` and `a.2.jpg`."""

    def __init__(self, paths: PathTable, name_of: Callable[[str], str]) -> None:
        self.hashes = name_hashes(name_of(path) for path in paths)
        _, group_of, counts = np.unique(self.hashes, return_inverse=True, return_counts=True)
        groups: dict[int, list[int]] = {}
        self.shared: dict[int, list[int]] = {}
        """Image -> all images whose file is this image's too; only where there are several."""
        for image in np.flatnonzero(counts[group_of] > 1).tolist():
            self.shared[image] = groups.setdefault(int(group_of[image]), [])
            self.shared[image].append(image)


def _folder_of_train(source: Path) -> Path:
    """The folder in which `train` lies: SOURCE, or the only folder in SOURCE that has one."""
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give the folder that holds FKD's train/CLASS/IMAGE.tar")
    if (source / "train").is_dir():
        return source
    below = [entry for entry in sorted(source.iterdir()) if (entry / "train").is_dir()]
    if len(below) != 1:
        raise InputError(f"{source}: holds no train/CLASS/IMAGE.tar; give the folder in which FKD's `train` lies")
    return below[0]


class _Files:
    """The label file of each image: where the generator writes it, or else where the training script reads it."""

    def __init__(self, folder: Path, paths: PathTable) -> None:
        self.folder, self.paths = folder, paths
        self.written = FileNames(paths, generator_name)
        self.trained = FileNames(paths, trainer_name)

    def path(self, image: int) -> Path | None:
        if image in self.written.shared:
            return None
        name, other = self._names(image)
        if (self.folder / name).is_file():
            return self.folder / name
        if image not in self.trained.shared and (self.folder / other).is_file():
            return self.folder / other
        return None

    def why_none(self, image: int) -> str:
        name, other = self._names(image)
        if image in self.written.shared:
            others = ", ".join(self.paths[i] for i in self.written.shared[image][:3])
            return f"{name}: belongs to several images ({others}), since FKD cuts names at their first dot; which was labelled is unknown"
        return f"{name}{'' if name == other else f' or {other}'}: no such file"

    def _names(self, image: int) -> tuple[str, str]:
        path = self.paths[image]
        return generator_name(path), trainer_name(path)

    def unused(self) -> Iterator[str]:
        """Tells of files that belong to no image of the dataset."""
        known = np.concatenate([self.written.hashes, self.trained.hashes])
        found = [os.path.join(top, name) for top, _, names in os.walk(self.folder / "train") for name in names if name.endswith(".tar")]
        found = [os.path.relpath(name, self.folder) for name in found]
        extra = np.flatnonzero(~np.isin(name_hashes(found), known)).tolist()
        if extra:
            shown = ", ".join(sorted(found[i] for i in extra)[:3])
            more = " ..." if len(extra) > 3 else ""
            yield f"{len(extra):,} of {len(found):,} label files belong to no image and are left out ({shown}{more})"


# ---- What a file holds ---------------------------------------------------------------------------------------------------------


class _Content(NamedTuple):
    coords: NDArray[Any]
    flips: NDArray[Any]
    labels: NDArray[Any]


def _content(data: bytes, name: str) -> _Content:
    """The three arrays of a file: coords [M, 4] floating, flips [M], labels [M, ...]. Raises DamagedFile, CodeInFile or Unusable."""
    parts = read_torch_file(data, name)
    if not isinstance(parts, (list, tuple)) or len(parts) != 3 or not all(isinstance(part, Array) for part in parts):
        raise Unusable(f"{name}: is not FKD's [coords, flips, labels], three arrays")
    coords, flips, labels = (part.values for part in parts)
    if coords.ndim != 2 or coords.shape[1] != 4 or coords.dtype.kind != "f" or flips.shape != coords.shape[:1] or not len(coords):
        raise Unusable(f"{name}: coords {coords.dtype} {coords.shape} and flips {flips.shape}, where FKD has [crops, 4] and [crops]")
    if labels.shape[:1] != coords.shape[:1] or labels.dtype.kind not in "fiu":
        raise Unusable(f"{name}: labels {labels.dtype} {labels.shape} for {len(coords):,} crops")
    return _Content(coords, flips, labels)


@dataclasses.dataclass(frozen=True)
class _Form:
    """What all files of a set have in common."""

    label_type: str
    ndim: int
    width: int  # of a label: the k of the file, its classes if dense, 1 otherwise
    crops: int
    k: int  # that is kept
    precision: str


def _form_of(settings: FkdSettings, files: _Files, images: int, classes: int) -> _Form:
    """The form of the first readable file; all others must have the same. Raises InputError when it fits no type, or not the one named."""
    problem: InputError | None = None
    readable = 0
    for image in range(images):
        file = files.path(image)
        if file is None:
            continue
        name = str(file.relative_to(files.folder))
        try:
            content = _content(read_labels(file), name)
            break
        except (DamagedFile, Unusable) as error:
            problem = problem or error
            readable += 1
            if not settings.allow_failures or readable == FIRST_FILES:
                raise problem from None
    else:
        raise problem or InputError(f"{settings.source}: has no labels for any of the {images:,} images ({files.why_none(0)})")
    shape, ndim = content.labels.shape, content.labels.ndim
    fits: dict[str, bool] = {
        "hard": ndim == 1,
        "smoothing": ndim == 2 and shape[1] == 2,
        "dense": ndim == 2 and shape[1] == classes,
        "marginal_smoothing_k5": ndim == 3 and shape[1:] == (2, 5),
        "marginal_smoothing_k10": ndim == 3 and shape[1:] == (2, 10),
        "marginal_renorm_k5": ndim == 3 and shape[1:] == (2, 5),
    }
    chosen = settings.label_type
    if chosen == "auto":
        if fits["smoothing"] and fits["dense"]:
            raise InputError(f"{name}: labels {shape} of 2 classes are `smoothing` or `dense`; say which with --label-type")
        if ndim == 2 and not (fits["smoothing"] or fits["dense"]):
            raise InputError(
                f"{name}: labels {shape} have {shape[1]:,} columns, but there are {classes:,} classes; say how many with --classes"
            )
        found = [kind for kind, does_fit in fits.items() if does_fit]
        if not found:
            raise InputError(f"{name}: labels {shape} are of no type that FKD writes")
        described = " or ".join(found)  # both k5 types: the same files
    elif fits[chosen]:
        described = chosen
    else:
        raise InputError(f"{name}: labels {shape} of {classes:,} classes are not {chosen}; leave out --label-type, or say --classes")
    dense = described == "dense"
    width = 1 if ndim < 3 and not dense else shape[-1]
    if settings.topk is not None and settings.topk > width:
        raise InputError(f"topk: {settings.topk}, but {name} has {width} probabilities a crop; choose at most that many")
    if settings.crops is not None and settings.crops > len(content.coords):
        raise InputError(f"crops: {settings.crops}, but {name} has {len(content.coords)}; choose at most that many")
    if width > classes:
        raise InputError(f"{name}: has {width} probabilities a crop, but there are {classes:,} classes; say how many with --classes")
    k = settings.topk or (min(DENSE_TOPK, width) if dense else width)
    return _Form(described, ndim, width, len(content.coords), k, str(content.coords.dtype))


class _Reader:
    """Reads one image's file into boxes and labels, and remembers what was odd."""

    def __init__(self, settings: FkdSettings, form: _Form, classes: int, files: _Files, say: Callable[[str], None]) -> None:
        self.settings, self.form, self.classes, self.files, self.say = settings, form, classes, files, say
        self.resized: list[str] = []
        self.inexact: list[str] = []

    def read(self, image: int, data: bytes, width: int, height: int) -> CropLabels:
        file = self.files.path(image)
        name = str(file.relative_to(self.files.folder)) if file else self.files.paths[image]
        content = _content(data, name)
        stored, form = len(content.coords), self.form
        if stored != form.crops if self.settings.crops is None else stored < self.settings.crops:
            wanted = self.settings.crops or form.crops
            raise Unusable(f"{name}: has {stored:,} crops, others {wanted:,}; {EQUAL_CROPS}")
        content = _Content(*(part[: self.settings.crops] for part in content))
        boxes = self._boxes(content.coords, width, height, name)
        ids, probs = self._labels(content.labels, name)
        return CropLabels(boxes, content.flips == 1, ids, probs)

    def _boxes(self, coords: NDArray[Any], width: int, height: int, name: str) -> NDArray[np.int64]:
        """The pixels that FKD's trainer cuts: Pillow rounds left and left + width, each by itself (halves to even)."""
        exact = coords.astype(np.float64)
        if not np.isfinite(exact).all():
            raise Unusable(f"{name}: has coordinates that are no numbers")
        top, left, tall, wide = (exact[:, i] * side for i, side in enumerate((height, width, height, width)))
        x0, x1, y0, y1 = (np.rint(edge).clip(-MAX_SIDE, 2 * MAX_SIDE).astype(np.int64) for edge in (left, left + wide, top, top + tall))
        half = coords.dtype == np.float16
        # A corner and a size in float16 are each off by up to half of its step, which is a 2,048th of the photo's side.
        slack = 1 + max(width, height) // 1024 if half else 0
        if x0.min() < 0 or y0.min() < 0 or x1.max() > width + slack or y1.max() > height + slack:
            raise Unusable(
                f"{name}: a crop reaches outside its photo of {width} x {height} pixels, so its coordinates are not shares of it"
            )
        x1, y1 = np.minimum(x1, width), np.minimum(y1, height)
        if (x1 <= x0).any() or (y1 <= y0).any():
            raise Unusable(f"{name}: has a crop without pixels on a photo of {width} x {height}")
        if half:
            if max(width, height) > 1024:
                self.inexact.append(name)
        elif max(float(np.abs(edge - np.rint(edge)).max()) for edge in (top, left, tall, wide)) > 0.05:
            self.resized.append(name)
        return np.stack([x0, y0, x1 - x0, y1 - y0], 1)

    def _labels(self, labels: NDArray[Any], name: str) -> tuple[NDArray[np.int64], NDArray[np.floating[Any]]]:
        form = self.form
        dense = form.label_type == "dense"
        shape = {1: (), 2: (form.width if dense else 2,), 3: (2, form.width)}[form.ndim]
        if labels.shape[1:] != shape:
            raise Unusable(f"{name}: labels {labels.shape}, others [crops, {', '.join(str(n) for n in shape)}]: another type of label")
        if dense:
            probs = labels.astype(np.float32)
            if not (np.abs(probs.sum(1) - 1) < 0.02).all():  # float16 over thousands of classes strays by up to 0.01; NaN is refused too
                raise Unusable(f"{name}: has dense labels that do not sum to 1")
            ids = np.argpartition(-probs, form.k - 1, axis=1)[:, : form.k]
            return checked_labels(ids, np.take_along_axis(probs, ids, 1), self.classes, form.k, name)
        if labels.dtype == np.float16 and self.classes > HALF_IDS:
            raise InputError(
                f"{name}: has class ids as float16, which counts exactly up to {HALF_IDS:,} only, and there are {self.classes:,} classes: "
                "its ids are wrong and cannot be recovered; make the labels again without FKD's --use_fp16"
            )
        if form.ndim == 1:
            return checked_labels(labels[:, None], np.ones((len(labels), 1), np.float32), self.classes, 1, name)
        ids, probs = (labels[:, :1], labels[:, 1:]) if form.ndim == 2 else (labels[:, 0], labels[:, 1])
        return checked_labels(ids, probs, self.classes, form.k, name)

    def say_what_was_odd(self) -> None:
        """Warns of boxes that may not be the teacher's to the pixel."""
        for names, what in (
            (
                self.resized,
                "photos do not have the size they had when they were labelled: their crops are no whole pixels, and were rounded",
            ),
            (self.inexact, "photos are larger than 1,024 pixels with coordinates in float16: crops may be a pixel off, as they are in FKD"),
        ):
            if names:
                self.say(f"WARNING: {len(names):,} {what} ({', '.join(sorted(names)[:3])}{' ...' if len(names) > 3 else ''})")
