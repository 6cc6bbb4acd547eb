"""A store as files that FKD's own training script reads, a region policy applied. docs/formats.md says what its script makes of them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import PIL.Image
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

from ferkd.durable import naming_file, write_whole
from ferkd.errors import InputError, SourceLost
from ferkd.interop.fkd import FileNames, trainer_name
from ferkd.regions import Region, RegionPolicy, confidence_of, region_of
from ferkd.remote import refuse_url
from ferkd.sources import DataFlag, Photos, kind_of, labelled_photos
from ferkd.store import ImageLabels, LabelStore

ExportType = Literal["hard", "smoothing", "marginal_smoothing_k5", "marginal_smoothing_k10", "dense"]
KEPT: dict[str, int] = {"hard": 1, "smoothing": 1, "marginal_smoothing_k5": 5, "marginal_smoothing_k10": 10}
MARKER, LEFT_OUT = "ferkd-export.json", "left-out.txt"
ORIENTATION = 0x0112  # EXIF's tag


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """What to export. Discarded crops are left out; calibrated ones carry the softened ground truth."""

    store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """The label store."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Where the files go: a folder for FKD's --softlabel_path, new or empty, or one that this command wrote."""
    label_type: ExportType | Literal["auto"] = "auto"
    """FKD's --soft_label_type (`dense` is its `ori`). `auto`: the smallest that holds what the store holds."""
    policy: RegionPolicy = RegionPolicy()
    num_crops: int = 4
    """FKD's --num_crops: an image with fewer crops left repeats them, because the script stops there otherwise."""
    data: DataFlag | None = None
    """The dataset, to find the photos with an EXIF orientation: FKD's script does not turn them, so they are left out."""

    def __post_init__(self) -> None:
        if self.num_crops < 1:
            raise InputError(f"num_crops: {self.num_crops}; give a whole number of at least 1")


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written: images and crops, crops by Region, and the images that have no file, with the reason."""

    label_type: str
    images: int
    crops: int
    regions: tuple[int, int, int]
    repeated: int
    left_out: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        regions = {region.name.lower(): self.regions[region] for region in Region}
        return {**dataclasses.asdict(self), "regions": regions, "left_out": len(self.left_out)}


def export_fkd(settings: ExportSettings, say: Callable[[str], None]) -> Exported:
    """Writes OUT/train/CLASS/IMAGE.tar for every image that has crops left; the same call writes all again after an interruption.

    A file appears whole, by renaming, but is not flushed to disk: a flush for each of a million files would take hours.
    Raises InputError for a folder that holds something else, a type that cannot hold the labels, and images that would share a file.
    """
    refuse_url(settings.out, "out")
    store = LabelStore(settings.store)
    if kind_of(store) != "folder":
        raise InputError(f"{settings.store}: was not labelled from a folder, and FKD's script reads train/CLASS/IMAGE only")
    label_type = _label_type(settings.label_type, store)
    names = FileNames(store.paths, trainer_name)
    if names.shared:
        image, sharers = next(iter(names.shared.items()))
        raise InputError(
            f"{store.source}: {len(names.shared):,} images share files in FKD's naming, which cuts train/CLASS/IMAGE at its first dot: "
            f"{', '.join(store.paths[i] for i in sharers[:3])} would all be {trainer_name(store.paths[image])}; rename them and label again"
        )
    job = {
        "format": "fkd",
        "store_sha256": store.manifest_sha256,
        "label_type": label_type,
        "policy": dataclasses.asdict(settings.policy),
        "num_crops": settings.num_crops,
    }
    _claim(settings.out, job)
    for line in _warnings(settings, store):
        say(line)

    regions = np.zeros(3, np.int64)
    left_out: dict[str, str] = {}
    photos = None if settings.data is None else labelled_photos(settings.data, store)
    crops = repeated = 0
    for image in range(len(store)):
        labels = store.read(image)
        why = _unfit(labels, photos, store.exif_applied)
        if why is None:
            boxes, flips = labels.boxes(np.arange(store.crops))
            adapted, region = adapted_labels(store, labels, settings.policy, label_type)
            regions += np.bincount(region, minlength=3)
            chosen = np.flatnonzero(region != Region.DISCARDED)
            if len(chosen) == 0:
                why = "every crop is discarded"
            elif len(chosen) < settings.num_crops:
                repeated += 1
                chosen = np.resize(chosen, settings.num_crops)
        if why is not None:
            left_out[labels.path] = why
            (settings.out / trainer_name(labels.path)).unlink(missing_ok=True)  # of an earlier run, when the photo was another
            continue
        content = [
            torch.from_numpy(shares(boxes[chosen], labels.width, labels.height)),
            torch.from_numpy(flips[chosen]),
            torch.from_numpy(adapted[chosen]),
        ]
        _write(settings.out / trainer_name(labels.path), content)
        crops += len(chosen)

    exported = Exported(
        label_type, len(store) - len(left_out), crops, (int(regions[0]), int(regions[1]), int(regions[2])), repeated, left_out
    )
    lines = "".join(f"{path}\t{reason}\n" for path, reason in left_out.items())
    write_whole(settings.out / LEFT_OUT, [lines.encode("utf-8", "surrogateescape")])
    write_whole(settings.out / MARKER, [_json({**job, "done": True, **exported.as_dict()})])
    for line in _summary(settings, store, exported):
        say(line)
    return exported


def shares(boxes: NDArray[Any], width: int, height: int) -> NDArray[np.float32]:
    """FKD's coordinates [M, 4] of boxes [M, 4] (left, top, width, height): (top / H, left / W, height / H, width / W) in float32."""
    left, top, wide, tall = (boxes[:, i].astype(np.float64) for i in range(4))
    return np.stack([top / height, left / width, tall / height, wide / width], 1).astype(np.float32)


def adapted_labels(store: LabelStore, labels: ImageLabels, policy: RegionPolicy, label_type: str) -> tuple[NDArray[Any], NDArray[np.int8]]:
    """An image's labels in FKD's form, calibrated ones replaced by the softened ground truth, and each crop's region [M].

    Shapes: `hard` [M] int64; `smoothing` [M, 2]; marginal types [M, 2, k] (ids, then probabilities); `dense` [M, C]; all float32.
    """
    stored = store.unpack(labels.label_words)
    target = torch.full((len(stored[0]),), labels.target)
    confidence = confidence_of(torch.from_numpy(stored[0]), torch.from_numpy(stored[1]), target, store.classes, policy.confidence)
    region = region_of(confidence, policy).numpy()
    calibrated = region == Region.CALIBRATED
    ids, probs = _each_class_once(*stored)
    true, other = 1 - policy.smoothing, policy.smoothing / (store.classes - 1)
    if label_type == "dense":
        dense = _dense(ids, probs, store.classes)
        dense[calibrated] = other
        dense[calibrated, labels.target] = true
        return dense, region
    ids, probs = _top(ids, probs, KEPT[label_type], store.classes)
    ids[calibrated] = np.append(labels.target, _other_classes(np.array([labels.target]), ids.shape[1] - 1))
    probs[calibrated] = np.append(true, np.full(ids.shape[1] - 1, other))
    if label_type == "hard":
        return ids[:, 0], region
    rows = np.stack([ids, probs], 1).astype(np.float32)
    return rows[:, :, 0] if label_type == "smoothing" else rows, region


def _each_class_once(ids: NDArray[np.int64], probs: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The same labels in float64 where an id that a label repeats has the whole sum at its first place and -1 as id elsewhere."""
    exact = probs.astype(np.float64)
    ids = ids.copy()
    ordered = np.sort(ids, axis=1)
    for row in np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1)).tolist():
        for j, number in enumerate(ids[row].tolist()):
            places = np.flatnonzero(ids[row] == number)
            if number >= 0 and len(places) > 1 and places[0] == j:
                exact[row, j] = exact[row, places].sum()
                ids[row, places[1:]], exact[row, places[1:]] = -1, 0.0
    return ids, exact


def _tail(ids: NDArray[np.int64], probs: NDArray[np.float64], classes: int) -> NDArray[np.float64]:
    """What each class outside a label has [M, 1]: an even share of what is left over."""
    outside = classes - (ids >= 0).sum(axis=1, keepdims=True)
    share: NDArray[np.float64] = np.maximum(0.0, 1.0 - probs.sum(axis=1, keepdims=True)) / np.maximum(outside, 1)
    return share


def _dense(ids: NDArray[np.int64], probs: NDArray[np.float64], classes: int) -> NDArray[np.float32]:
    rows = np.broadcast_to(_tail(ids, probs, classes), (len(ids), classes)).astype(np.float32)
    row, place = np.nonzero(ids >= 0)
    rows[row, ids[row, place]] = probs[row, place]
    return rows


def _top(ids: NDArray[np.int64], probs: NDArray[np.float64], k: int, classes: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels of exactly k classes [M, k]: the most probable, and where there are fewer, others with their share of the tail: no change."""
    tail = _tail(ids, probs, classes)
    order = np.argsort(np.where(ids >= 0, -probs, 1.0), axis=1, kind="stable")[:, :k]
    ids, probs = np.take_along_axis(ids, order, 1), np.take_along_axis(probs, order, 1)
    if ids.shape[1] < k:
        more = ((0, 0), (0, k - ids.shape[1]))
        ids, probs = np.pad(ids, more, constant_values=-1), np.pad(probs, more)
    for row in np.flatnonzero((ids < 0).any(axis=1)).tolist():
        missing = ids[row] < 0
        ids[row, missing] = _other_classes(ids[row, ~missing], int(missing.sum()))
        probs[row, missing] = tail[row, 0]
    return ids, probs


def _other_classes(ids: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The `count` lowest class ids that are not among `ids`."""
    return np.setdiff1d(np.arange(len(ids) + count), ids)[:count]


def _label_type(wanted: str, store: LabelStore) -> str:
    """The type to write. Raises InputError when the store's classes are too few for it."""
    if wanted == "auto":
        fitting = [name for name, k in KEPT.items() if name != "hard" and store.k <= k <= store.classes]
        return fitting[0] if fitting else "dense"
    if KEPT.get(wanted, 1) > store.classes:
        raise InputError(f"label_type: {wanted} needs {KEPT[wanted]} classes, and the store has {store.classes}; choose dense")
    return wanted


def _unfit(labels: ImageLabels, photos: Photos | None, exif_applied: bool) -> str | None:
    """Why FKD's script cannot use an image, or None."""
    if labels.width == 0:
        return "the store has no labels for it"
    if photos is None:
        return None
    try:
        data = photos.read(labels.path)
    except SourceLost as error:
        raise InputError(f"{error.stops}: what is written so far is kept") from error
    except InputError as error:
        return str(error).removeprefix(f"{photos.name(labels.path)}: ")
    try:
        with PIL.Image.open(io.BytesIO(data)) as photo:
            size, orientation = photo.size, photo.getexif().get(ORIENTATION, 1)
    except Exception as error:  # Pillow's plug-ins raise what they like
        return f"cannot be read ({type(error).__name__})"
    if exif_applied and orientation not in (0, 1):
        return f"has EXIF orientation {orientation}, and FKD's script does not turn photos"
    if size != (labels.width, labels.height):
        return f"has {size[0]} x {size[1]} pixels, and had {labels.width} x {labels.height} when it was labelled"
    return None


def _claim(out: Path, job: dict[str, Any]) -> None:
    """Makes the folder this export's own. Raises InputError when it holds anything else."""
    marker = out / MARKER
    with naming_file(out):
        if marker.is_file():
            try:
                found = json.loads(marker.read_bytes())
            except ValueError:
                found = None
            if not isinstance(found, dict) or any(found.get(key) != value for key, value in json.loads(_json(job)).items()):
                raise InputError(f"{out}: holds another export; give a new or empty folder")
        elif out.exists() and (not out.is_dir() or any(name != f"{MARKER}.tmp" for name in os.listdir(out))):
            raise InputError(f"{out}: is not empty; give a new or empty folder")
        out.mkdir(parents=True, exist_ok=True)
    write_whole(marker, [_json({**job, "done": False})])


def _write(file: Path, content: list[Tensor]) -> None:
    """Writes tensors, not FKD's NumPy arrays: a torch since 2.6 reads these without its --weights_only off, and an older one as well."""
    box = io.BytesIO()
    torch.save(content, box)
    temporary = file.with_name(f"{file.name}.tmp")
    with naming_file(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(box.getbuffer())
            os.replace(temporary, file)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"


def _warnings(settings: ExportSettings, store: LabelStore) -> list[str]:
    """What FKD's script would get wrong without telling."""
    lines = []
    if store.exif_applied and settings.data is None:
        lines.append(
            "WARNING: the store's photos were turned by their EXIF orientation, and FKD's script does not turn them: "
            "--data DIR leaves out those it concerns"
        )
    numbered = {folder: i for i, folder in enumerate(sorted(store.folders))}
    odd = [folder for folder, number in store.folders.items() if numbered[folder] != number]
    if odd:
        lines.append(
            f"WARNING: FKD's script numbers classes by their sorted folders, so that {odd[0]!r} is class {numbered[odd[0]]} to it and "
            f"{store.folders[odd[0]]} in the labels: it learns rightly, but the accuracies that it prints are wrong"
        )
    return lines


def _summary(settings: ExportSettings, store: LabelStore, exported: Exported) -> list[str]:
    discarded, calibrated, kept = exported.regions
    flag = "ori" if exported.label_type == "dense" else exported.label_type
    lines = [
        f"{settings.out}: {exported.crops:,} crops of {exported.images:,} images as {flag} "
        f"({discarded:,} discarded, {calibrated:,} calibrated, {kept:,} kept)",
        f"for FKD's script: --softlabel_path {settings.out} --soft_label_type {flag} --num_classes {store.classes} "
        f"--num_crops {settings.num_crops}",
    ]
    if exported.repeated:
        lines.append(f"{exported.repeated:,} images have fewer than {settings.num_crops} crops left and repeat them")
    if exported.left_out:
        lines.append(
            f"WARNING: {len(exported.left_out):,} images have no file ({LEFT_OUT} names them): "
            "FKD's script stops at an image without one, so take them out of its train folder"
        )
    return lines
