"""What all conversions have in common: their settings, which class is which, and what becomes of images without usable labels."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from ferkd.classes import IMAGENET_VARIANTS, class_mapping, wordnet_ids
from ferkd.crops import DECODER, RESAMPLER, CropSettings
from ferkd.errors import InputError, SourceLost
from ferkd.filling import evenly, fill_store, say_result
from ferkd.interop.pickles import DamagedFile
from ferkd.loss import check_topk
from ferkd.records import pack_boxes, pack_labels
from ferkd.sources import Split, read_photo, scan_split
from ferkd.store import LabelledImage, LabelStore, StorePlan

FINGERPRINT_FILES = 16
MOST_BYTES = 1 << 28
LOW_AGREEMENT = 0.2
EQUAL_CROPS = "a store has as many of each image; --crops takes the first so many"


class Unusable(InputError):
    """The labels of one image cannot be used; with --allow-failures it is recorded as failed."""


@dataclasses.dataclass(frozen=True)
class ConvertSettings:
    """What to convert into which store. The same settings go on with a store that was begun."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The folder with the label files."""
    store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """The store's folder: new, empty, or one that the same command began."""
    data: Path
    """The dataset that was labelled: a folder with train/CLASS/*.jpg."""
    classes: int | None = None
    """How many classes the labels distinguish. Default: what SOURCE says, or as many as there are class folders."""
    class_names: Path | None = None
    """A text file with the class folders' names by class id, one a line. Default: sorted folders, or ImageNet's order."""
    crops: int | None = None
    """Take only the first so many crops of each image. Default: all."""
    topk: int | None = None
    """Keep only so many of the most probable classes. Default: all that the files name; 5 of dense labels."""
    allow_failures: bool = False
    """Record images whose labels are missing or damaged as failed, instead of stopping at the first."""
    workers: int | None = None
    """Threads that read and decode. Default: one a core, at most 16."""

    def __post_init__(self) -> None:
        for name, lowest in (("classes", 2), ("crops", 1), ("topk", 1), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise InputError(f"{name}: {value}; give a whole number of at least {lowest}")


@dataclasses.dataclass(frozen=True)
class Classes:
    """The names of the classes by class id, and the class id of each class folder."""

    names: tuple[str, ...]
    of_folder: dict[str, int]

    def targets(self, split: Split) -> NDArray[np.int64]:
        """The ground truth of every image, [N]."""
        return np.array([self.of_folder[folder] for folder in split.folders], np.int64)[split.folder_of]


def labelled_split(data: Path) -> Split:
    """The photographs that other people's labels are for. Raises InputError for other sources than folders: labels find them by path."""
    split = scan_split(data, "train")
    if split.photos.kind != "folder":
        raise InputError(
            f"data: {data} is no folder; the labels of other people find their photographs by their place in it: give train/CLASS/*.jpg"
        )
    return split


def choose_classes(settings: ConvertSettings, folders: Sequence[str], declared: int | None = None) -> Classes:
    """Which class each id of the labels means. `declared`: how many classes the label files say there are.

    Raises InputError when a folder has no class, or the names given are not as many as the classes.
    """
    count = settings.classes or declared
    if settings.class_names is not None:
        try:
            names = settings.class_names.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{settings.class_names}: cannot be read as a list of names ({error})") from error
        if len(names) < 2 or (count is not None and len(names) != count):
            raise InputError(f"{settings.class_names}: {len(names):,} lines; give the name of each of the {count or 'at least 2'} classes")
        return Classes(tuple(names), class_mapping(folders, names, len(names)))
    count = count or len(folders)
    if count == len(folders):
        if count < 2:
            raise InputError(f"classes: there is one class folder ({folders[0]!r}); say with --classes how many the labels distinguish")
        names = sorted(folders)  # as torchvision's ImageFolder numbers them
        return Classes(tuple(names), {name: i for i, name in enumerate(names)})
    try:
        mapping = class_mapping(folders, None, count)
    except InputError as error:
        raise InputError(
            f"classes: {count:,}, but {len(folders):,} class folders: give --class-names FILE, a name a line ({error})"
        ) from error
    names = wordnet_ids(count) if count in IMAGENET_VARIANTS else [f"class {i}" for i in range(count)]
    for folder, index in mapping.items():
        names[index] = folder
    return Classes(tuple(names), mapping)


@dataclasses.dataclass(frozen=True)
class CropLabels:
    """One image's labels as a file has them: boxes [M, 4] int (left, top, width, height), flips [M] bool, ids [M, k] int, probs [M, k]."""

    boxes: NDArray[np.int64]
    flips: NDArray[np.bool_]
    ids: NDArray[np.int64]
    probs: NDArray[np.floating[Any]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A set of label files: which file each image has, what its labels look like, and how to read one."""

    name: str
    """`fkd` or `ml-dr`."""
    files: Callable[[int], Path | None]
    """Image -> its label file, None when it has none."""
    why_none: Callable[[int], str]
    """Image -> why it has none."""
    read: Callable[[int, bytes, int, int], CropLabels]
    """(image, the file's bytes, the photo's width and height in pixels) -> its labels. Raises Unusable, or another InputError to stop."""
    crops: int
    k: int
    crop_settings: CropSettings
    described: dict[str, Any]
    """What the manifest records."""


def convert(settings: ConvertSettings, split: Split, classes: Classes, source: Source, say: Callable[[str], None]) -> LabelStore:
    """Fills settings.store from a source of labels. Photos are decoded as the labels' makers did: without regard to EXIF orientation.

    Raises InputError naming the file when an image's labels are missing or unusable (unless failures are allowed), StoreError as
    StoreWriter does.
    """
    images = len(split)
    missing = [image for image in range(images) if source.files(image) is None]
    if len(missing) == images:
        raise InputError(f"{settings.source}: has no labels for any of the {images:,} images of {split} ({source.why_none(0)})")
    if missing and not settings.allow_failures:
        shown = "; ".join(source.why_none(image) for image in missing[:3])
        raise InputError(
            f"{settings.source}: no labels for {len(missing):,} of {images:,} images ({shown}{' ...' if len(missing) > 3 else ''}); "
            "complete the label files, or record these images as failed with --allow-failures"
        )
    check_topk(source.k)
    plan = StorePlan(
        paths=split.paths,
        targets=classes.targets(split),
        crops=source.crops,
        k=source.k,
        class_names=classes.names,
        folders=classes.of_folder,
        box_codec="stored",
        label_codec="half",
        crop_settings=source.crop_settings,
        batch_size=1,
        temperature=1.0,
        provenance={
            "converted_from": {"format": source.name, **source.described, "files_sha256": _fingerprint(settings.source, source, images)},
            "decoder": {**DECODER, "apply_exif": False},
            "resampler": dict(RESAMPLER),
            "software": {"python": platform.python_version(), "ferkd": _version()},
            "dataset_fingerprint": split.fingerprint(),
        },
    )
    say(f"{images:,} images x {plan.crops} crops, {plan.image_bytes // plan.crops} bytes a crop, into {settings.store}")

    def labelled(image: int) -> LabelledImage:
        path = split.paths[image]
        file = source.files(image)
        if file is None and not settings.allow_failures:  # all had one when the work began
            raise InputError(f"{split.name(image)}: {source.why_none(image)}; bring the labels back and start the same command again")
        if file is None:
            return LabelledImage(0, 0, 0, None, None, source.why_none(image))
        try:
            photo, crc = read_photo(split.photos, path, apply_exif=False)
        except SourceLost as error:
            raise InputError(f"{error.stops}: what is converted so far is kept") from error
        except InputError as error:
            return LabelledImage(0, 0, 0, None, None, str(error).removeprefix(f"{split.name(image)}: "))
        height, width = photo.shape[1:]
        try:
            labels = source.read(image, read_labels(file), width, height)
            boxes = pack_boxes(labels.boxes, labels.flips)
            words = pack_labels(labels.ids, labels.probs, "half", plan.classes)
        except (Unusable, DamagedFile) as error:
            if settings.allow_failures:
                return LabelledImage(0, 0, 0, None, None, str(error))
            raise InputError(f"{error}; or record such images as failed with --allow-failures") from error
        return LabelledImage(width, height, crc, boxes, words)

    store = fill_store(settings.store, plan, labelled, say, settings.workers)
    share = say_result(store, say)
    if share is not None and share < LOW_AGREEMENT:
        say("WARNING: that is little. Is --data the dataset that was labelled, and are its classes numbered as in the labels?")
    return store


def read_labels(file: Path) -> bytes:
    """A label file's bytes. Raises Unusable for one that cannot be read, or is larger than labels are."""
    try:
        with open(file, "rb") as opened:
            data = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise Unusable(f"{file.name}: cannot be read ({error.strerror})") from error
    if len(data) > MOST_BYTES:
        raise Unusable(f"{file.name}: is larger than {MOST_BYTES:,} bytes, which no image's labels are")
    return data


def checked_labels(
    ids: NDArray[Any], probs: NDArray[Any], classes: int, topk: int, name: str
) -> tuple[NDArray[np.int64], NDArray[np.floating[Any]]]:
    """The `topk` most probable of ids [M, k] and probs [M, k], as a file has them, checked: whole ids, no class twice, probabilities.

    Raises InputError for an id that is no class, since then the number of classes is wrong; Unusable for the rest.
    """
    numbers = np.asarray(ids, np.float64)
    if not np.isfinite(numbers).all() or (numbers != np.rint(numbers)).any():
        raise Unusable(f"{name}: has class ids that are no whole numbers")
    whole = numbers.astype(np.int64)
    if whole.size and not (whole.min() >= 0 and whole.max() < classes):
        worst = whole.max() if whole.max() >= classes else whole.min()
        raise InputError(
            f"{name}: has class id {worst}, but ids run from 0 to {classes - 1}: say with --classes how many classes the labels distinguish"
        )
    ordered = np.sort(whole, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise Unusable(f"{name}: names a class twice in one label")
    exact = np.asarray(probs)
    if not ((exact >= 0) & (exact <= 1 + 1e-3)).all():  # NaN included
        raise Unusable(f"{name}: has probabilities outside [0, 1]")
    exact = np.minimum(exact, 1)
    if topk < whole.shape[1]:
        best = np.argsort(-exact, axis=1, kind="stable")[:, :topk]
        whole, exact = np.take_along_axis(whole, best, 1), np.take_along_axis(exact, best, 1)
    return whole, exact


def name_hashes(names: Iterable[str]) -> NDArray[np.uint64]:
    """64-bit hashes of names: 8 bytes a name, where a million strings would take a hundred megabytes."""
    digests = (hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), np.uint64)


def _fingerprint(folder: Path, source: Source, images: int) -> str:
    """SHA-256 over the label files' names and sizes and the content of 16 of them: another teacher's files often have the same sizes."""
    digest = hashlib.sha256()
    sampled = iter([*evenly(images, FINGERPRINT_FILES).tolist(), images])
    next_sampled = next(sampled)
    for image in range(images):
        file = source.files(image)
        if file is not None:
            digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\n".encode("utf-8", "surrogateescape"))
            if image >= next_sampled:
                digest.update(read_labels(file))
                next_sampled = next(sampled)
    return digest.hexdigest()


def _version() -> str:
    from ferkd import __version__

    return __version__
