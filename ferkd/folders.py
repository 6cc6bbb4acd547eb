"""A folder of photographs, DIR/train/CLASS/**/*.jpg and DIR/val/CLASS/**/*.jpg, as arrays; and which class of a teacher a folder means.

A folder of a million photographs is a path table and one int32 an image: no Python object is kept for each of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ferkd.errors import InputError
from ferkd.store import PathTable

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif", ".avif", ".jfif"})

# The ImageNet variants that a number of outputs identifies, by timm's names. Within each, class index = place in its list of WordNet ids.
IMAGENET_VARIANTS = {
    1000: "imagenet-1k",
    11221: "imagenet-21k-miil",
    11821: "imagenet-12k",
    21841: "imagenet-22k",
    21842: "imagenet-22k-ms",
    21843: "imagenet-21k-goog",
}

_WORDNET_ID = re.compile(r"(n\d{8})(?!\d)")


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of DIR/train or DIR/val.

    `paths`: N paths relative to `root` (which is the split's own folder), with POSIX separators, sorted by their UTF-8 bytes.
    `folders`: the names of the class folders, sorted. `folder_of`: int32 [N], each image's index into `folders`.
    """

    root: Path
    paths: PathTable
    folders: tuple[str, ...]
    folder_of: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """SHA-256 over the sorted (relative path, size in bytes): one stat an image, no content is read.

        Notices images added, removed, renamed or re-encoded to another size; the CRC of each photo notices the rest.
        """
        digest = hashlib.sha256()
        for i in range(len(self.paths)):
            path = self.paths[i]
            try:
                size = os.stat(os.path.join(self.root, path)).st_size
            except OSError as error:
                raise InputError(f"{self.root / path}: cannot be read ({error.strerror}); did the folder change meanwhile?") from error
            digest.update(f"{path}\0{size}\n".encode())
        return digest.hexdigest()


def scan_split(root: Path, split: Literal["train", "val"]) -> Split:
    """Lists the images under root/split/CLASS, at any depth below CLASS.

    Hidden files and folders are ignored and symbolic links followed. A file is an image when its extension is in IMAGE_EXTENSIONS,
    whatever its case; nothing is opened.

    Raises InputError when the split or its class folders are missing, when a class folder holds no image, when images lie
    directly in the split, or when a name is not UTF-8.
    """
    root = Path(root)
    folder = root / split
    if not folder.is_dir():
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; --data wants a folder that holds train/CLASS/*.jpg and val/CLASS/*.jpg")
        above = f"; did you mean --data {root.parent}?" if (root.parent / split).is_dir() else ""
        raise InputError(f"{folder}: no such folder{above or f'; put the photographs in {folder}/CLASS/*.jpg, one folder a class'}")
    names, loose = [], []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            names.append(_utf8(entry.name, folder))
        elif _is_image(entry.name):
            loose.append(entry.name)
    if loose:
        raise InputError(
            f"{folder}: {len(loose):,} image(s) lie directly in it (such as {min(loose)!r}), so their class is unknown; "
            f"move each into its class's folder, {folder}/CLASS/"
        )
    if not names:
        raise InputError(f"{folder}: has no class folders; put the photographs in {folder}/CLASS/*.jpg, one folder a class")

    names.sort()
    keyed: list[tuple[bytes, int]] = []
    for index, name in enumerate(names):
        before = len(keyed)
        keyed.extend((path.encode(), index) for path in _images_below(folder, name, ()))
        if len(keyed) == before:
            raise InputError(
                f"{folder / name}: class folder without an image; add images ({', '.join(sorted(IMAGE_EXTENSIONS))}) or remove the folder"
            )
    # Not simply class by class: "a b/x" comes before "a/x", because the space sorts before the separator.
    keyed.sort()
    folder_of = np.fromiter((index for _, index in keyed), np.int32, len(keyed))
    return Split(folder, PathTable.from_paths(key.decode() for key, _ in keyed), tuple(names), folder_of)


def _images_below(top: Path, relative: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """The images in top/relative and below, as paths relative to top. `above`: the folders on the way here, to see a cycle of links."""
    here = os.path.join(top, relative)
    try:
        status = os.stat(here)
        entries = list(os.scandir(here))
    except OSError as error:
        raise InputError(f"{here}: cannot be listed ({error.strerror}); make it readable or remove it") from error
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise InputError(f"{here}: a symbolic link that leads back to a folder above it; remove the link")
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _images_below(top, f"{relative}/{_utf8(entry.name, here)}", (*above, identity))
        elif _is_image(entry.name):
            if entry.is_symlink() and not _is_file(entry.path):
                raise InputError(f"{entry.path}: a symbolic link to nothing; remove it or restore what it points to")
            yield f"{relative}/{_utf8(entry.name, here)}"


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def _utf8(name: str, folder: Path | str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{folder}: holds a file whose name is not UTF-8 ({os.fsencode(name)!r}); rename it") from error
    return name


def check_same_classes(train: Split, val: Split) -> None:
    """Raises InputError, listing the difference both ways, unless the two splits have the same class folders."""
    missing = sorted(set(train.folders) - set(val.folders))
    extra = sorted(set(val.folders) - set(train.folders))
    if missing or extra:
        parts = [f"not in val: {_some(missing)}"] if missing else []
        parts += [f"only in val: {_some(extra)}"] if extra else []
        raise InputError(
            f"{val.root}: its class folders are not those of {train.root} ({'; '.join(parts)}); "
            "give both splits the same class folders, with the same names"
        )


def class_mapping(folders: Sequence[str], teacher_classes: Sequence[str] | None, outputs: int) -> dict[str, int]:
    """Which class index of a model with `outputs` classes each folder means.

    In this order: (1) a folder named exactly like one of `teacher_classes` (names by class index); (2) ImageNet: a folder whose name
    begins with a WordNet id (n02102040, n04507155_umbrella) means that class, when `teacher_classes` are WordNet ids or, for a teacher
    with no such names, when `outputs` is that of an ImageNet variant; (3) with no names at all and as many outputs as folders,
    the sorted order of the folders, which is said aloud.

    Raises InputError when a folder has no class or two folders mean the same one.
    """
    if teacher_classes is not None and len(teacher_classes) != outputs:
        raise InputError(f"classes: the teacher names {len(teacher_classes):,} classes but has {outputs:,} outputs; name every output once")
    index_of = _unique_index(teacher_classes or ())
    mapping = {folder: index_of[folder] for folder in folders if folder in index_of}

    rest = [folder for folder in folders if folder not in mapping]
    if rest and any(_WORDNET_ID.match(folder) for folder in rest):
        index_of_id = _wordnet_index(teacher_classes, outputs)
        for folder in rest:
            found = _WORDNET_ID.match(folder)
            if found and found[1] in index_of_id:
                mapping[folder] = index_of_id[found[1]]

    if not mapping and teacher_classes is None and outputs == len(folders):
        log.warning(
            "The teacher does not name its %d classes: taking them to be the folders in sorted order (%s). The preflight checks this.",
            outputs,
            _some(sorted(folders)),
        )
        mapping = {folder: i for i, folder in enumerate(sorted(folders))}

    unknown = [folder for folder in folders if folder not in mapping]
    if unknown:
        known = f"it knows {_some(list(teacher_classes))}" if teacher_classes else "it does not name its classes"
        raise InputError(
            f"class folders without a class of the teacher ({len(unknown):,} of {len(folders):,}): {_some(unknown)}. The teacher has "
            f"{outputs:,} outputs and {known}. Rename the folders to the teacher's classes (for an ImageNet teacher: WordNet ids such as "
            "n02102040), or let a python:MODULE:CALLABLE teacher return {'classes': [folder names by class index]}"
        )
    folder_of_class: dict[int, str] = {}
    for folder, index in mapping.items():
        if index in folder_of_class:
            raise InputError(f"class folders {folder_of_class[index]!r} and {folder!r} both mean the teacher's class {index}; merge them")
        folder_of_class[index] = folder
    return {folder: mapping[folder] for folder in folders}


def wordnet_ids(outputs: int) -> list[str]:
    """The WordNet ids, by class index, of the ImageNet variant that has this many classes (a key of IMAGENET_VARIANTS)."""
    try:
        timm_data = importlib.import_module("timm.data")
    except ImportError as error:
        raise InputError("ImageNet's list of classes comes with timm, which is not installed; pip install 'ferkd[timm]'") from error
    return list(timm_data.ImageNetInfo(IMAGENET_VARIANTS[outputs]).label_names())


def _unique_index(names: Sequence[str]) -> dict[str, int]:
    """name -> index, without the names that occur twice (ImageNet's English names have two "crane"s): those identify nothing."""
    index_of: dict[str, int] = {}
    twice = set()
    for i, name in enumerate(names):
        if name in index_of:
            twice.add(name)
        index_of[name] = i
    return {name: i for name, i in index_of.items() if name not in twice}


def _wordnet_index(teacher_classes: Sequence[str] | None, outputs: int) -> dict[str, int]:
    named = [_WORDNET_ID.match(name) for name in teacher_classes or ()]
    if named and any(named):
        return _unique_index([found[1] if found else "" for found in named])
    if outputs in IMAGENET_VARIANTS:
        return _unique_index(wordnet_ids(outputs))
    return {}


def _some(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown
