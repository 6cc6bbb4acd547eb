"""What a store says of itself: its manifest, sealed by its own hash, and the table of its images' paths. docs/formats.md specifies both."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
import mmap
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd.crops import CropSettings
from ferkd.errors import InputError, StoreError
from ferkd.records import BoxCodec, LabelCodec, crop_bytes
from ferkd.shards import shard_file

FORMAT = "ferkd-store"
VERSION = 1

INDEX_HEADER = struct.Struct("<8sIIQQ")  # magic, version, bytes a row, images, bytes of paths
INDEX_MAGIC = b"ferkdidx"


class PathTable:
    """N relative paths, sorted by their bytes and distinct, as one blob and its N + 1 offsets: no Python object per path."""

    def __init__(self, blob: bytes | mmap.mmap, offsets: npt.NDArray[np.uint64], start: int = 0, file: str = "index.bin") -> None:
        self._blob, self._offsets, self._start, self._file = blob, offsets, start, file
        self._at, self._len = offsets.data, len(offsets) - 1  # its elements are plain integers, and quicker than NumPy's

    @classmethod
    def from_paths(cls, paths: Iterable[str]) -> PathTable:
        """Sorts the paths; `/` separates, and what is not UTF-8 is carried as surrogates. So image numbers follow this order.

        Raises InputError for no path, a repeated one, an absolute one or one that leaves its folder.
        """
        names = sorted(path.encode("utf-8", "surrogateescape") for path in paths)
        if not names:
            raise InputError("paths: there is no image")
        for i, name in enumerate(names):
            if not is_inside(name):
                raise InputError(f"paths: {name!r} is not a path below the dataset's folder")
            if i and names[i - 1] == name:
                raise InputError(f"paths: {name!r} is named twice")
        offsets = np.zeros(len(names) + 1, np.uint64)
        np.cumsum([len(name) for name in names], out=offsets[1:])
        return cls(b"".join(names), offsets)

    def __reduce__(self) -> tuple[type[PathTable], tuple[bytes, npt.NDArray[np.uint64]]]:
        return PathTable, (b"".join(self.chunks()), np.array(self._offsets))

    def __len__(self) -> int:
        return self._len

    def raw(self, i: int) -> bytes:
        """Path i's bytes. Raises IndexError outside [0, N), StoreError for offsets that are damaged."""
        if not 0 <= i < self._len:
            raise IndexError(f"image {i} of {self._len}")
        begin, end = self._at[i], self._at[i + 1]
        path = bytes(self._blob[self._start + begin : self._start + end])
        if len(path) != end - begin:  # slices stop at the end in silence
            raise StoreError(f"{self._file}: the offsets of image {i} are {begin} and {end}: it is damaged; fetch it again")
        return path

    def __getitem__(self, i: int) -> str:
        return self.raw(i).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def index_of(self, path: str) -> int:
        """The number of a path, by bisection. Raises InputError when it is not in the table."""
        wanted = path.encode("utf-8", "surrogateescape")
        i = bisect.bisect_left(range(len(self)), wanted, key=self.raw)
        if i == len(self) or self.raw(i) != wanted:
            raise InputError(f"{path}: is not among the {len(self):,} images")
        return i

    def sha256(self) -> str:
        """SHA-256 of the offsets (u64, little-endian) and then the paths' bytes."""
        digest = hashlib.sha256(np.ascontiguousarray(self._offsets, "<u8").data)
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def chunks(self) -> Iterator[bytes]:
        """The paths' bytes, one after the other without separators, a few megabytes at a time."""
        end = self._start + int(self._offsets[-1])
        for at in range(self._start, end, 1 << 22):
            yield bytes(self._blob[at : min(at + (1 << 22), end)])

    @property
    def offsets(self) -> npt.NDArray[np.uint64]:
        """[N + 1] uint64: path i is bytes offsets[i] to offsets[i + 1]."""
        return self._offsets


def is_inside(path: bytes) -> bool:
    """Whether a path is relative and stays below its folder: no empty, `.` or `..` component, no NUL."""
    if not (b"/." in path or b"//" in path or b"\0" in path or path[:1] in (b"", b"/", b".") or path[-1:] == b"/"):
        return True  # nearly every path, and every read asks
    return b"\0" not in path and not any(part in (b"", b".", b"..") for part in path.split(b"/"))


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard as the manifest names it; `file` is relative to the store."""

    file: str
    images: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What manifest.json says. `sha256` is the manifest's own and names the store's whole content."""

    images: int
    crops: int
    k: int
    class_names: tuple[str, ...]
    folders: Mapping[str, int]
    box_codec: BoxCodec
    label_codec: LabelCodec
    crop_settings: CropSettings
    temperature: float
    batch_size: int
    dataset: Mapping[str, str]
    provenance: Mapping[str, Any]
    resumed_with: tuple[str, ...]
    shard_images: int
    shards: tuple[Shard, ...]
    index: Shard
    failed: Mapping[str, str]
    sha256: str

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def crop_bytes(self) -> int:
        return crop_bytes(self.box_codec, self.label_codec, self.k, self.classes)

    @property
    def image_bytes(self) -> int:
        return self.crops * self.crop_bytes


_SEAL = re.compile(rb'"sha256": "([0-9a-f]{64})"\n\}\n\Z')


def sealed_json(content: Mapping[str, Any]) -> bytes:
    """JSON whose last key is its own SHA-256: that of the same text with 64 zeros there."""
    text = json.dumps({**content, "sha256": "0" * 64}, indent=1, ensure_ascii=True).encode() + b"\n"
    head, _, tail = text.rpartition(b"0" * 64)
    return head + hashlib.sha256(text).hexdigest().encode() + tail


def read_sealed(path: Path, whole_store: str) -> dict[str, Any]:
    """Reads JSON written by sealed_json, checking format, version and seal. `whole_store` is what to do when it is damaged."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        content = json.loads(text)
    except ValueError as error:
        raise StoreError(f"{path}: is no JSON ({error}): it is damaged or was cut short; {whole_store}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise StoreError(f"{path}: does not say format {FORMAT!r}: this is not a store of labels; give the folder that ferkd label wrote")
    if content.get("version") != VERSION:
        raise StoreError(
            f"{path}: format version {content.get('version')!r}, this ferkd reads version {VERSION}; "
            "use the ferkd that wrote the store, or label again into another folder"
        )
    seal = _SEAL.search(text)
    found = hashlib.sha256(text[: seal.start(1)] + b"0" * 64 + text[seal.end(1) :]).hexdigest() if seal else "none"
    if not seal or found != seal[1].decode():
        raise StoreError(
            f"{path}: was edited or damaged (its text has SHA-256 {found[:16]}..., its last line says otherwise); {whole_store}"
        )
    return content


def read_manifest(store: Path) -> Manifest:
    content = read_sealed(store / "manifest.json", "fetch the store again, or label again into another folder")
    try:
        manifest = Manifest(
            **{
                name: content[name]
                for name in ("images", "crops", "k", "box_codec", "label_codec", "temperature", "batch_size", "shard_images")
            },
            **{name: content[name] for name in ("folders", "dataset", "provenance", "failed", "sha256")},
            class_names=tuple(content["class_names"]),
            crop_settings=CropSettings(**content["crop_settings"]),
            resumed_with=tuple(content["resumed_with"]),
            shards=tuple(Shard(**shard) for shard in content["shards"]),
            index=Shard(**content["index"]),
        )
        whole = sum(shard.images for shard in manifest.shards) == manifest.images
        sizes = all(shard.bytes == shard.images * manifest.image_bytes for shard in manifest.shards)
        files = all(shard.file == shard_file(i) for i, shard in enumerate(manifest.shards)) and manifest.index.file == "index.bin"
    except (KeyError, TypeError, AttributeError, InputError) as error:
        raise StoreError(f"{store / 'manifest.json'}: lacks or misstates {error}; fetch the store again") from error
    if not (whole and sizes and files):
        raise StoreError(f"{store / 'manifest.json'}: its shards do not add up to its {manifest.images:,} images; fetch the store again")
    return manifest


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
