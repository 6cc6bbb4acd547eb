"""Where photographs come from: a folder, tar shards as WebDataset writes them, or a Hugging Face dataset. What `--data` says, as arrays.

A split of a million photographs is a path table and one int32 an image: no Python object is kept for each of them. Every photograph has a
stable name (its path in the folder; shard and path in the tar; split and row), which is what a store keeps of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import tyro
from numpy.typing import NDArray

from ferkd.classes import ClassNumbers, some
from ferkd.crops import Photo, decode
from ferkd.errors import InputError, StoreError
from ferkd.store import LabelStore, PathTable

Data = str | os.PathLike[str]
"""What `--data` takes: DIR, wds:DIR or hf:NAME."""
DataFlag = Annotated[str | Path, tyro.conf.arg(metavar="DATA")]
"""The same on the command line."""

SplitName = Literal["train", "val"]
Kind = Literal["folder", "wds", "hf"]

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif", ".avif", ".jfif"})

_PLACES: Mapping[str, str] = {"folder": "a folder", "wds": "tar shards (wds:)", "hf": "a Hugging Face dataset (hf:)"}


class Photos(Protocol):
    """The photographs of one split, as encoded bytes by name. Pickles into loader processes and is safe in threads and after a fork.

    `str()` of it is what people call the split.
    """

    @property
    def kind(self) -> Kind: ...

    def name(self, path: str) -> str:
        """What errors call a photograph."""

    def read(self, path: str) -> bytes:
        """A photograph's bytes, decoded by nobody. Raises InputError, which begins with its name();
        SourceLost where not it alone is gone."""

    def __contains__(self, path: str) -> bool: ...

    def sizes(self, paths: PathTable) -> Iterator[int]:
        """The bytes of each photograph of the whole split, whose paths these are; no content is read."""

    def described(self) -> dict[str, Any]:
        """What a store says of where its photographs came from: JSON, and nothing that depends on where the dataset lies."""


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of a dataset's train or val, and where their bytes are.

    `paths`: N names, with POSIX separators, sorted by their UTF-8 bytes. `folders`: the names of the classes (of a folder's class folders),
    sorted. `folder_of`: int32 [N], each image's index into `folders`. `numbers`: where the dataset numbers its classes itself.
    """

    photos: Photos
    paths: PathTable
    folders: tuple[str, ...]
    folder_of: NDArray[np.int32]
    numbers: ClassNumbers | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __str__(self) -> str:
        return str(self.photos)

    def name(self, image: int) -> str:
        """What errors call an image."""
        return self.photos.name(self.paths[image])

    def fingerprint(self) -> str:
        """SHA-256 over the sorted (name, size in bytes): no content is read.

        Notices images added, removed, renamed or re-encoded to another size; the CRC of each photo notices the rest.
        """
        digest = hashlib.sha256()
        for path, size in zip(self.paths, self.photos.sizes(self.paths), strict=True):
            digest.update(f"{path}\0{size}\n".encode())
        return digest.hexdigest()


class Source(Protocol):
    """A dataset, of which nothing was read yet."""

    def has(self, split: SplitName) -> bool:
        """Whether it has this split."""

    def photos(self, split: SplitName) -> Photos:
        """Its photographs by name: nothing is listed where that is not needed to find them."""

    def scan(self, split: SplitName) -> Split:
        """Lists its images and their classes. Raises InputError for a dataset of another shape."""


def source_of(data: Data) -> Source:
    """The dataset that `--data` names: `wds:DIR`, `hf:NAME` (see tars.py and hub.py), or a folder."""
    text = os.fspath(data)
    kind, colon, rest = text.partition(":")
    if kind == "wds" and colon:
        from ferkd.sources.tars import TarShards

        return TarShards(Path(rest).expanduser())
    if kind == "hf" and colon:
        from ferkd.sources.hub import HubDataset

        return HubDataset.parse(rest)
    from ferkd.sources.folders import Folder

    return Folder(Path(text))


def scan_split(data: Data, split: SplitName) -> Split:
    """Lists a dataset's images and their classes. Raises InputError for a split that is missing or of another shape."""
    return source_of(data).scan(split)


def kind_of(store: LabelStore) -> str:
    """What kind of source a store was labelled from. It is recorded where it is no folder."""
    source = store.manifest.provenance.get("source")
    return str(source.get("kind")) if isinstance(source, dict) else "folder"


def labelled_photos(data: Data, store: LabelStore) -> Photos:
    """The photographs that a store's labels were made from. Raises StoreError when `data` is another kind of source."""
    photos = source_of(data).photos("train")
    check_same_kind(photos, store)
    return photos


def check_same_kind(photos: Photos, store: LabelStore) -> None:
    """Raises StoreError for photographs from another kind of source than those a store was labelled from."""
    kind = kind_of(store)
    if kind != photos.kind:
        raise StoreError(
            f"{store.source}: was labelled from {_PLACES.get(kind, kind)}, and {photos} is {_PLACES[photos.kind]}: images have "
            "other names there, so labels would not find theirs; give the --data that was labelled, or label this one"
        )


def read_photo(photos: Photos, path: str, *, apply_exif: bool = True) -> Photo:
    """Reads a photo's bytes once, and decodes them. Raises InputError as `read` and `decode` do."""
    data = photos.read(path)
    return Photo(decode(data, apply_exif=apply_exif, name=photos.name(path)), zlib.crc32(data))


def check_same_classes(train: Split, val: Split) -> None:
    """Raises InputError, listing the difference both ways, unless the two splits have the same classes."""
    missing = sorted(set(train.folders) - set(val.folders))
    extra = sorted(set(val.folders) - set(train.folders))
    if missing or extra:
        parts = [f"not in val: {some(missing)}"] if missing else []
        parts += [f"only in val: {some(extra)}"] if extra else []
        what = "class folders" if train.photos.kind == "folder" else "classes"
        raise InputError(
            f"{val}: its {what} are not those of {train} ({'; '.join(parts)}); give both splits the same {what}, with the same names"
        )
