"""A folder of photographs, DIR/train/CLASS/**/*.jpg and DIR/val/CLASS/**/*.jpg."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ferkd.errors import ABOUT_THE_FILE, InputError, SourceLost
from ferkd.sources import IMAGE_EXTENSIONS, Kind, Split, SplitName
from ferkd.store import PathTable


@dataclasses.dataclass(frozen=True)
class Folder:
    """A dataset that is a folder."""

    root: Path

    def has(self, split: SplitName) -> bool:
        return (self.root / split).is_dir()

    def photos(self, split: SplitName) -> FolderPhotos:
        return FolderPhotos(self.root / split)

    def scan(self, split: SplitName) -> Split:
        return scan_folder(self.root, split)


@dataclasses.dataclass(frozen=True)
class FolderPhotos:
    """The files below a split's own folder, `root`, by their relative paths."""

    root: Path

    kind: Kind = dataclasses.field(default="folder", init=False)

    def __str__(self) -> str:
        return str(self.root)

    def name(self, path: str) -> str:
        return os.path.join(self.root, path)

    def read(self, path: str) -> bytes:
        name = os.path.join(self.root, path)
        try:
            with open(name, "rb") as file:
                return file.read()
        except OSError as error:
            if error.errno not in ABOUT_THE_FILE:
                raise SourceLost(f"{name}: cannot be read: {error.strerror}", name, error.strerror or "") from error
            folder = os.path.dirname(name)
            if not os.path.isdir(folder):
                raise SourceLost(f"{name}: cannot be read: {error.strerror}", folder) from error
            raise InputError(f"{name}: cannot be read: {error.strerror or error}") from error

    def __contains__(self, path: str) -> bool:
        return os.path.isfile(os.path.join(self.root, path))

    def sizes(self, paths: PathTable) -> Iterator[int]:
        for path in paths:
            try:
                yield os.stat(os.path.join(self.root, path)).st_size
            except OSError as error:
                raise InputError(f"{self.root / path}: cannot be read ({error.strerror}); did the folder change meanwhile?") from error

    def described(self) -> dict[str, Any]:
        return {}


def scan_folder(root: Path, split: SplitName) -> Split:
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
    return Split(FolderPhotos(folder), PathTable.from_paths(key.decode() for key, _ in keyed), tuple(names), folder_of)


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
