"""A store of labels: a folder of manifest, image index and shards. docs/formats.md specifies every byte.

LabelStore reads; StoreWriter writes, and can be killed at any moment and started again. Nothing here is ever unpickled, every
read is checked against a CRC32, and a store appears whole or not at all: its manifest is written last.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ferkd.crops import CropSettings, draw_crops, drawn_quickly, unpacked_quickly
from ferkd.durable import JobLock, lock_token, naming_file, sync_folder, write_whole
from ferkd.errors import InputError, StoreError
from ferkd.records import BoxCodec, LabelCodec, Records, crop_bytes, label_words, top_probabilities, unpack_labels
from ferkd.shards import ROW, UNIT_IMAGES, ShardRows, ShardWriter, shard_file
from ferkd.shards import LabelledImage as LabelledImage

if TYPE_CHECKING:
    from ferkd.regions import Confidence, RegionPolicy

FORMAT = "ferkd-store"
VERSION = 1
SHARD_BYTES = 64 << 20
SHARDS = 256

_ROW_DTYPE = np.dtype([("target", "<u4"), ("width", "<u2"), ("height", "<u2"), ("photo_crc", "<u4"), ("crc", "<u4")])
_INDEX_HEADER = struct.Struct("<8sIIQQ")  # magic, version, bytes a row, images, bytes of paths
_INDEX_MAGIC = b"ferkdidx"
_U4, _U8 = np.dtype("<u4"), np.dtype("<u8")
_OPEN_SHARDS = 256
_SCAN_CROPS = 1 << 16


def images_a_shard(image_bytes: int, images: int) -> int:
    """The images of a full shard, in whole units of 64: as many as fit 64 MiB, but of `images` so few that there are up to 256 shards,
    since shards are what processes that label together share out. It depends on nothing but the job, as a store's bytes must.
    """
    by_size = SHARD_BYTES // image_bytes // UNIT_IMAGES * UNIT_IMAGES
    by_count = -(-images // (SHARDS * UNIT_IMAGES)) * UNIT_IMAGES
    return max(UNIT_IMAGES, min(by_size, by_count))


class PathTable:
    """N relative paths, sorted by their bytes and distinct, as one blob and its N + 1 offsets: no Python object per path."""

    def __init__(self, blob: bytes | mmap.mmap, offsets: npt.NDArray[np.uint64], start: int = 0) -> None:
        self._blob, self._offsets, self._start = blob, offsets, start
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

    def __len__(self) -> int:
        return self._len

    def raw(self, i: int) -> bytes:
        """Path i's bytes. Raises IndexError outside [0, N), StoreError for offsets that are damaged."""
        if not 0 <= i < self._len:
            raise IndexError(f"image {i} of {self._len}")
        begin, end = self._at[i], self._at[i + 1]
        path = bytes(self._blob[self._start + begin : self._start + end])
        if len(path) != end - begin:  # slices stop at the end in silence
            raise StoreError(f"the index's offsets of image {i} are {begin} and {end}: index.bin is damaged; fetch it again")
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


# --- The manifest ---------------------------------------------------------------------------------------------------------------


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


def _sealed_json(content: Mapping[str, Any]) -> bytes:
    """JSON whose last key is its own SHA-256: that of the same text with 64 zeros there."""
    text = json.dumps({**content, "sha256": "0" * 64}, indent=1, ensure_ascii=True).encode() + b"\n"
    head, _, tail = text.rpartition(b"0" * 64)
    return head + hashlib.sha256(text).hexdigest().encode() + tail


def _read_sealed(path: Path, whole_store: str) -> dict[str, Any]:
    """Reads JSON written by _sealed_json, checking format, version and seal. `whole_store` is what to do when it is damaged."""
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


def _read_manifest(store: Path) -> Manifest:
    content = _read_sealed(store / "manifest.json", "fetch the store again, or label again into another folder")
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


# --- Reading --------------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """What the index says of an image, without its labels. width = 0: the photo could not be read when it was to be labelled."""

    path: str
    target: int
    width: int
    height: int
    photo_crc: int


@dataclasses.dataclass(slots=True)
class ImageLabels:
    """An image's records: `label_words` [M, W] uint32 as they lie in the store (read-only), and what the index says of the image.

    width = 0: the photo could not be read when it was to be labelled, and the words mean nothing.
    """

    image: int
    path: str
    target: int
    width: int
    height: int
    photo_crc: int
    label_words: npt.NDArray[np.uint32]
    box_words: npt.NDArray[np.uint64] | None
    crop_settings: CropSettings

    def boxes(self, crops: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """The boxes [n, 4] int32 (left, top, width, height) and flips [n] bool of the crops numbered `crops` [n]."""
        if self.width == 0:
            raise StoreError(f"{self.path}: could not be read when the store was made, so it has no crops")
        if self.box_words is not None:
            return unpacked_quickly(self.box_words[crops])
        crops = np.asarray(crops)
        drawn = drawn_quickly(self.crop_settings, self.image, crops, len(self.label_words), self.width, self.height)
        if drawn is not None:
            return drawn
        if len(crops) and not 0 <= int(crops.min()) <= int(crops.max()) < len(self.label_words):
            raise IndexError(f"crops {crops} of {len(self.label_words)}")
        return draw_crops(self.crop_settings, self.image, crops, self.width, self.height)


@dataclasses.dataclass(frozen=True)
class PolicyScan:
    """A store under a policy: `usable` [N] bool, the images with a crop that is not discarded; `counts` [3] int64, crops by Region."""

    usable: npt.NDArray[np.bool_]
    counts: npt.NDArray[np.int64]


class _OpenShard:
    """A file descriptor that lives as long as somebody uses it: one thread may forget a shard while another reads it."""

    __slots__ = ("fd",)

    def __init__(self, path: Path, size: int) -> None:
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise StoreError(f"{path}: is missing; {_REBUILD}") from error
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error
        _check_size(path, os.fstat(self.fd).st_size, size)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.fd)


_REBUILD = "fetch it again, or delete it and run the same ferkd label command to rebuild it"


def _check_size(path: Path, found: int, expected: int) -> None:
    if found < expected:
        raise StoreError(f"{path}: {found:,} bytes, the manifest says {expected:,}: the copy was cut short; {_REBUILD}")
    if found > expected:
        raise StoreError(f"{path}: {found:,} bytes, the manifest says {expected:,}: it is not this store's file; {_REBUILD}")


class LabelStore:
    """A finished store, opened for reading. Safe in forked and spawned workers and in threads; it pickles as its path.

    Opening reads the manifest and maps the index, whatever the store's size. Raises StoreError, which names the file, for a store
    that is missing, unfinished, edited, of another format version, or that lacks a shard or part of one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not (self.path / "manifest.json").is_file():
            if not self.path.is_dir():
                raise StoreError(f"{self.path}: no such folder; give the folder that ferkd label wrote")
            if (self.path / "job.json").is_file():
                raise StoreError(f"{self.path}: labelling was not finished; run the same ferkd label command again to finish it")
            raise StoreError(f"{self.path}: has no manifest.json: this is not a store of labels; give the folder that ferkd label wrote")
        self.manifest = _read_manifest(self.path)
        self._open_index()
        for shard in self.manifest.shards:
            try:
                size = os.stat(self.path / shard.file).st_size
            except FileNotFoundError as error:
                raise StoreError(f"{self.path / shard.file}: is missing; {_REBUILD}") from error
            except OSError as error:
                raise StoreError(f"{self.path / shard.file}: cannot be opened: {error.strerror}") from error
            _check_size(self.path / shard.file, size, shard.bytes)
        m = self.manifest
        self.crops, self.k, self.classes, self.class_names = m.crops, m.k, m.classes, m.class_names
        self.box_codec, self.label_codec, self.crop_settings = m.box_codec, m.label_codec, m.crop_settings
        self.folders = dict(m.folders)
        self.manifest_sha256 = m.sha256
        self.label_width = label_words(m.label_codec, m.k, m.classes)
        self._image_bytes, self._shard_images = m.image_bytes, m.shard_images
        self._box_bytes = m.image_bytes - 4 * m.crops * self.label_width
        # A plain dict, whose single operations no other thread comes between; an OrderedDict's, of which a shard's closing is part, break.
        self._open: dict[int, _OpenShard] = {}

    def __reduce__(self) -> tuple[type[LabelStore], tuple[Path]]:
        return LabelStore, (self.path,)

    def __len__(self) -> int:
        return self.manifest.images

    def __repr__(self) -> str:
        return f"LabelStore({str(self.path)!r}: {len(self):,} images x {self.crops} crops, k={self.k} of {self.classes} classes)"

    @property
    def exif_applied(self) -> bool:
        """Whether photos are turned by their EXIF orientation before the boxes are cut."""
        return bool(self.manifest.provenance.get("decoder", {}).get("apply_exif", True))

    def _open_index(self) -> None:
        m, path = self.manifest, self.path / "index.bin"
        again = "fetch it again; without it the store must be labelled again into another folder"
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != m.index.bytes or size < _INDEX_HEADER.size:
                    raise StoreError(f"{path}: {size:,} bytes, the manifest says {m.index.bytes:,}: the copy was cut short; {again}")
                self._index = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise StoreError(f"{path}: is missing; {again}") from error
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error
        found = _INDEX_HEADER.unpack_from(self._index)
        self._rows_at = _INDEX_HEADER.size + 8 * (m.images + 1)
        self._paths_at = self._rows_at + ROW.size * m.images
        if found != (_INDEX_MAGIC, VERSION, ROW.size, m.images, m.index.bytes - self._paths_at):
            raise StoreError(f"{path}: its header says {found}, which does not fit the manifest's {m.images:,} images; {again}")
        offsets: npt.NDArray[np.uint64] = np.frombuffer(self._index, "<u8", m.images + 1, _INDEX_HEADER.size)
        self.paths = PathTable(self._index, offsets, self._paths_at)
        self._rows = np.frombuffer(self._index, _ROW_DTYPE, m.images, self._rows_at)

    @property
    def targets(self) -> npt.NDArray[np.uint32]:
        """The ground truth of every image, [N] uint32, read from the mapped index as it is used."""
        targets: npt.NDArray[np.uint32] = self._rows["target"]
        return targets

    def entry(self, image: int) -> Entry:
        """What the index says of an image. Only `read` checks it against its CRC32."""
        return Entry(
            self._path(image).decode("utf-8", "surrogateescape"), *ROW.unpack_from(self._index, self._rows_at + ROW.size * image)[:4]
        )

    def _path(self, image: int) -> bytes:
        raw = self.paths.raw(image)
        if not is_inside(raw):
            raise StoreError(
                f"{self.path / 'index.bin'}: image {image} is named {raw!r}, which is no path below the dataset's folder; fetch it again"
            )
        return raw

    def _shard(self, number: int) -> _OpenShard:
        shard = self._open.get(number)
        if shard is None:
            described = self.manifest.shards[number]
            shard = self._open[number] = _OpenShard(self.path / described.file, described.bytes)
            for oldest in list(self._open)[:-_OPEN_SHARDS]:
                self._open.pop(oldest, None)
        elif len(self.manifest.shards) > _OPEN_SHARDS:  # the most recently used stand last
            self._open.pop(number, None)
            self._open[number] = shard
        return shard

    def read(self, image: int) -> ImageLabels:
        """An image's labels by one pread, checked against the index's CRC32. Raises StoreError when anything was changed."""
        path = self._path(image)
        number, at = divmod(image, self._shard_images)
        size = self._image_bytes
        shard = self._shard(number)  # held by name, or another thread could make it close between here and the read
        block = os.pread(shard.fd, size, at * size)
        row_at = self._rows_at + ROW.size * image
        row = self._index[row_at : row_at + ROW.size]
        target, width, height, photo_crc, expected = ROW.unpack(row)
        if len(block) != size or zlib.crc32(row[:12] + path, zlib.crc32(block)) != expected:
            raise StoreError(
                f"{self.path / shard_file(number)}: the labels of image {image} ({path.decode('utf-8', 'replace')}) do not have the CRC32 "
                f"{expected:08x} that index.bin says: one of the two files was changed; {_REBUILD}"
            )
        words: npt.NDArray[np.uint32] = np.ndarray((self.crops, self.label_width), _U4, block, self._box_bytes)
        boxes: npt.NDArray[np.uint64] | None = np.ndarray((self.crops,), _U8, block) if self._box_bytes else None
        text = path.decode("utf-8", "surrogateescape")
        return ImageLabels(image, text, target, width, height, photo_crc, words, boxes, self.crop_settings)

    def unpack(self, words: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The ids [n, k] int64 and probabilities [n, k] float32 of label words [n, W]."""
        return unpack_labels(words, self.label_codec, self.k, self.classes)

    def records(self, words: npt.NDArray[np.uint32]) -> Records:
        """Label words [B, W] as the loss takes them; memory is shared where the array is writable."""
        import torch

        words = np.require(words, np.uint32, ["C", "W"])
        return Records(torch.from_numpy(words.view(np.int32)), self.label_codec, self.k, self.classes)

    def scan(self, policy: RegionPolicy, progress: Callable[[int, int], None] | None = None) -> PolicyScan:
        """Which images are usable under a policy, and how many crops fall in each region.

        Reads the whole store once and keeps the answer in STORE/policies, if that can be written. `progress` is called with the
        number of images done and the number of all.
        """
        cache = self.path / "policies" / f"{policy.fingerprint()}.npy"
        key = bytes.fromhex(self.manifest_sha256)
        cached = _read_scan(cache, key, len(self))
        if cached is None:
            cached = self._scan(policy, progress)
            with contextlib.suppress(OSError):
                cache.parent.mkdir(exist_ok=True)
                _write_scan(cache, key, cached)
        return cached

    def _scan(self, policy: RegionPolicy, progress: Callable[[int, int], None] | None) -> PolicyScan:
        import torch

        from ferkd.regions import Region, region_of

        usable = np.zeros(len(self), np.bool_)
        counts = np.zeros(len(Region), np.int64)
        for images, confidence in self.confidences(policy.confidence, progress):
            region = region_of(torch.from_numpy(confidence), policy).numpy()
            usable[images] = (region != Region.DISCARDED).any(axis=1)
            counts += np.bincount(region.ravel(), minlength=len(Region))
        return PolicyScan(usable, counts)

    def confidences(
        self, kind: Confidence, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[list[int], npt.NDArray[np.float32]]]:
        """The confidence of every crop of the store, some images at a time: their numbers, and float32 [images, M]. Images that could
        not be read when they were labelled are left out."""
        import torch

        from ferkd.regions import confidence_of

        n, m = len(self), self.crops
        step = max(1, _SCAN_CROPS // m)
        words = np.empty((step, m, self.label_width), np.uint32)
        for first in range(0, n, step):
            images: list[int] = []
            for image in range(first, min(first + step, n)):
                labels = self.read(image)
                if labels.width:
                    words[len(images)] = labels.label_words
                    images.append(image)
            if images:
                rows = words[: len(images)].reshape(-1, self.label_width)
                if kind == "max":
                    confidence = top_probabilities(rows, self.label_codec, self.k, self.classes)
                else:
                    ids, probs = (torch.from_numpy(part) for part in self.unpack(rows))
                    target = torch.from_numpy(self.targets[images].astype(np.int64)).repeat_interleave(m)
                    confidence = confidence_of(ids, probs, target, self.classes, kind).numpy()
                yield images, confidence.reshape(-1, m)
            if progress:
                progress(min(first + step, n), n)

    def check_integrity(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Reads every byte of the store and compares all hashes. Raises StoreError that names each damaged file, and images where possible.

        `progress` is called with the number of files done and the number of all.
        """
        m = self.manifest
        damage = []
        for number, shard in enumerate((m.index, *m.shards)):
            path = self.path / shard.file
            if _sha256(path) != shard.sha256:
                bad = self._damaged_images(number - 1) if number else []
                of = f" ({len(bad):,} images: {', '.join(bad[:3])}{' ...' if len(bad) > 3 else ''})" if bad else ""
                damage.append(f"{path}: its SHA-256 is not what the manifest says{of}")
            if progress:
                progress(number + 1, len(m.shards) + 1)
        if damage:
            raise StoreError("; ".join(damage) + f"; {_REBUILD}")

    def _damaged_images(self, shard: int) -> list[str]:
        first = shard * self.manifest.shard_images
        damaged = []
        for image in range(first, first + self.manifest.shards[shard].images):
            try:
                self.read(image)
            except StoreError:
                damaged.append(self.paths[image])
        return damaged


def _read_scan(cache: Path, key: bytes, images: int) -> PolicyScan | None:
    """A kept scan, or None when there is none, it is damaged or it is of another store."""
    try:
        data: npt.NDArray[np.uint8] = np.load(cache, allow_pickle=False)
        text = data.tobytes()
    except (OSError, ValueError, EOFError):
        return None
    bits = (images + 7) // 8
    if len(text) != 32 + 24 + bits + 4 or text[:32] != key or zlib.crc32(text[:-4]) != int.from_bytes(text[-4:], "little"):
        return None
    usable = np.unpackbits(np.frombuffer(text, np.uint8, bits, 56), count=images, bitorder="little").astype(np.bool_)
    return PolicyScan(usable, np.frombuffer(text, "<i8", 3, 32).copy())


def _write_scan(cache: Path, key: bytes, scan: PolicyScan) -> None:
    text = key + scan.counts.astype("<i8").tobytes() + np.packbits(scan.usable, bitorder="little").tobytes()
    text += zlib.crc32(text).to_bytes(4, "little")
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, np.frombuffer(text, np.uint8), allow_pickle=False)
    os.replace(temporary, cache)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# --- Writing --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class StorePlan:
    """All that identifies a labelling job. Two plans that differ in more than device and software versions make different stores.

    `targets` [N] integer: the ground truth of each image, in the order of `paths`. `folders`: class folder name -> class id.
    `provenance` is JSON-able and holds teacher, preprocessing, software, decoder, resampler, device and the dataset's fingerprint;
    differences in `device`, `software` and in the versions of `decoder` and `resampler` only warn on resuming.
    Raises InputError for values that cannot be.
    """

    paths: PathTable
    targets: npt.NDArray[Any]
    crops: int
    k: int
    class_names: Sequence[str]
    folders: Mapping[str, int]
    box_codec: BoxCodec
    label_codec: LabelCodec
    crop_settings: CropSettings
    batch_size: int
    temperature: float
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        classes = len(self.class_names)
        crop_bytes(self.box_codec, self.label_codec, self.k, classes)
        targets = np.asarray(self.targets)
        if targets.shape != (len(self.paths),) or targets.dtype.kind not in "iu":
            raise InputError(f"targets: {targets.dtype} {targets.shape}; give one class id for each of the {len(self.paths):,} images")
        if int(targets.min()) < 0 or int(targets.max()) >= classes:
            raise InputError(f"targets: {int(targets.min())} to {int(targets.max())}; class ids run from 0 to {classes - 1}")
        for name, highest in (("crops", 1 << 32), ("batch_size", 1 << 32)):
            if not 1 <= getattr(self, name) < highest:
                raise InputError(f"{name}: {getattr(self, name)}; give a whole number of at least 1")
        try:
            json.dumps(self.provenance, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"provenance: cannot be written as JSON: {error}") from error

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def image_bytes(self) -> int:
        return self.crops * crop_bytes(self.box_codec, self.label_codec, self.k, self.classes)

    @property
    def shard_images(self) -> int:
        return images_a_shard(self.image_bytes, len(self.paths))

    def job(self) -> dict[str, Any]:
        """The plan as the manifest's first keys, in JSON's own types."""
        job = {
            "format": FORMAT,
            "version": VERSION,
            "images": len(self.paths),
            "crops": self.crops,
            "k": self.k,
            "classes": self.classes,
            "box_codec": self.box_codec,
            "label_codec": self.label_codec,
            "crop_settings": dataclasses.asdict(self.crop_settings),
            "temperature": float(self.temperature),
            "batch_size": self.batch_size,
            "shard_images": self.shard_images,
            "dataset": {
                "paths_sha256": self.paths.sha256(),
                "targets_sha256": hashlib.sha256(np.ascontiguousarray(self.targets, "<u4").data).hexdigest(),
            },
            "provenance": self.provenance,
            "class_names": list(self.class_names),
            "folders": dict(sorted(self.folders.items())),
        }
        plain: dict[str, Any] = json.loads(json.dumps(job))
        return plain


class StoreWriter:
    """Writes a store, or goes on with one that was begun: units of 64 images, then whole shards, then index and manifest.

    Everything written is safe when the call returns; a kill at any moment loses one unit at most, and the finished store is the same
    to the byte. A shard that is missing or short in a finished store is written anew. Other processes may write shards of the same job
    (see `joined_shards`) while this one holds the store's lock.

    Raises StoreError when `out` holds something else or another labelling job (it names what differs), when another labeller is at
    work on it, and when nothing can be written (disk full, read-only). Use it as a context manager, or call close().
    """

    def __init__(self, out: str | os.PathLike[str], plan: StorePlan) -> None:
        self.path, self.plan = Path(out), plan
        self._job = plan.job()
        self._resumed_with: list[str] = []
        self._shards = ShardWriter(self.path, plan, _job_key(self._job))
        with naming_file(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise StoreError(f"{self.path}: is a file; give a folder")
            known = {"lock", "shards", "policies", "job.json", "manifest.json", "index.bin"}
            if self.path.is_dir() and not {"job.json", "manifest.json"} & set(os.listdir(self.path)):
                others = sorted(name for name in os.listdir(self.path) if name not in known and not name.endswith(".tmp"))
                if others:
                    raise StoreError(f"{self.path}: holds {others[0]!r} and is not a store; give a new or empty folder")
            (self.path / "shards").mkdir(parents=True, exist_ok=True)
        self._lock = JobLock(self.path / "lock")
        try:
            self._resume()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the store free for others. What is written stays."""
        self._shards.close()
        self._lock.release()

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: the store has its manifest."""
        return (self.path / "manifest.json").exists()

    @property
    def token(self) -> str:
        """What names this run of the job to processes that join it."""
        return self._lock.token

    def _resume(self) -> None:
        job_file, manifest_file = self.path / "job.json", self.path / "manifest.json"
        if manifest_file.exists():
            content = _read_sealed(manifest_file, "label into another folder")
            differences = self._compare(content, manifest_file)
            self._resumed_with = content["resumed_with"]
            if all(self._shards.is_whole(shard) for shard in range(self._shards.shards)):
                self._clean()
                return
            self._resumed_with = sorted({*content["resumed_with"], *differences})
            self._unfinish()
        elif job_file.exists():
            content = _read_sealed(job_file, "delete the folder and label again")
            differences = self._compare(content, job_file)
            self._job["provenance"] = content["provenance"]
            self._resumed_with = content["resumed_with"]
            self.note(differences)
        else:
            self._write_job()
        for shard in range(self._shards.shards):
            if not self._shards.is_done(shard) and self._shards.next_image(shard) > self._shards.range(shard)[1]:
                self._shards.finish_shard(shard)  # killed between the last unit and the whole shard

    def _write_job(self) -> None:
        write_whole(self.path / "job.json", [_sealed_json({**self._job, "resumed_with": self._resumed_with})])

    def note(self, differences: Iterable[str]) -> None:
        """Notes in what the machines of later runs, or of processes that join, differ from the first: part of the finished manifest."""
        noted = sorted({*self._resumed_with, *differences})
        if noted != self._resumed_with and not self.finished:
            self._resumed_with = noted
            self._write_job()

    def _compare(self, found: Mapping[str, Any], file: Path) -> list[str]:
        differences = _compare_jobs(found, self._job, file)
        if differences:
            warnings.warn(
                f"{self.path}: was begun with other hardware or software ({'; '.join(text for text in differences.values())}); "
                "the labels will agree closely, not to the bit",
                stacklevel=4,
            )
        return list(differences)

    # -- What there is to do

    def missing(self) -> list[tuple[int, int, int]]:
        """What is left, in order: (shard, the first image that is not safe yet, the shard's last image)."""
        if self.finished:
            return []
        shards = self._shards
        return [(i, shards.next_image(i), shards.range(i)[1]) for i in range(shards.shards) if not shards.is_done(i)]

    def write_unit(self, shard: int, images: Sequence[LabelledImage]) -> None:
        """Appends the shard's next images: see ShardWriter."""
        self._shards.write_unit(shard, images)

    def finish_shard(self, shard: int) -> None:
        """Turns a shard whose units are all written into its file: see ShardWriter."""
        self._shards.finish_shard(shard)

    # -- The whole store

    def finish(self, failed: Mapping[str, str] | None = None) -> LabelStore:
        """Writes index and manifest when every shard is there, clears up, and opens the store.

        `failed` (path -> reason) replaces the reasons that were given with the units. Raises InputError when shards are missing.
        """
        if not self.finished:
            todo = self.missing()
            if todo:
                raise InputError(
                    f"{self.path}: {len(todo)} of {self._shards.shards} shards are not labelled yet; write them before finish()"
                )
            paths = self.plan.paths
            shards = []
            all_rows = []
            reasons: dict[str, str] = {}
            for shard in range(self._shards.shards):
                rows, failures, sha256 = self._shards.read_rows(shard)
                all_rows.append(rows)
                reasons.update({paths[int(image)]: reason for image, reason in failures.items()})
                images = len(rows) // ROW.size
                shards.append(dataclasses.asdict(Shard(shard_file(shard), images, images * self.plan.image_bytes, sha256.hex())))
            reasons.update({path: reason for path, reason in (failed or {}).items() if path in reasons})
            head = _INDEX_HEADER.pack(_INDEX_MAGIC, VERSION, ROW.size, len(paths), int(paths.offsets[-1]))
            offsets = np.ascontiguousarray(paths.offsets, "<u8").tobytes()
            digest, size = hashlib.sha256(), 0

            def index() -> Iterator[bytes]:
                nonlocal size
                for chunk in (head, offsets, *all_rows, *paths.chunks()):
                    digest.update(chunk)
                    size += len(chunk)
                    yield chunk

            write_whole(self.path / "index.bin", index())
            content = {**self._job, "resumed_with": self._resumed_with, "shards": shards}
            content["index"] = dataclasses.asdict(Shard("index.bin", len(paths), size, digest.hexdigest()))
            content["failed"] = dict(sorted(reasons.items()))
            write_whole(self.path / "manifest.json", [_sealed_json(content)])
            self._clean()
        self.close()
        return LabelStore(self.path)

    def _clean(self) -> None:
        """Removes what only labelling needs."""
        with naming_file(self.path):
            for name in os.listdir(self.path / "shards"):
                if name.endswith((".rows", ".part", ".tmp")):
                    (self.path / "shards" / name).unlink()
            for name in ("job.json", "job.json.tmp", "index.bin.tmp", "manifest.json.tmp"):
                (self.path / name).unlink(missing_ok=True)

    def _unfinish(self) -> None:
        """Makes a finished store with damaged shards one that is being labelled and lacks just these."""
        manifest = _read_manifest(self.path)
        index = self.path / "index.bin"
        if not index.exists() or _sha256(index) != manifest.index.sha256:
            raise StoreError(
                f"{index}: is missing or damaged, so that the other shards cannot be kept; fetch it again, or label into another folder"
            )
        data = index.read_bytes()
        rows_at = _INDEX_HEADER.size + 8 * (manifest.images + 1)
        numbers = {path: self.plan.paths.index_of(path) for path in manifest.failed}
        self._job["provenance"] = dict(manifest.provenance)
        self._write_job()
        for shard, described in enumerate(manifest.shards):
            if not self._shards.is_whole(shard):
                self._shards.file(shard, ".rows").unlink(missing_ok=True)
                continue
            first, last = self._shards.range(shard)
            rows = data[rows_at + ROW.size * first : rows_at + ROW.size * (last + 1)]
            failures = {str(numbers[path]): reason for path, reason in manifest.failed.items() if first <= numbers[path] <= last}
            self._shards.write_rows(shard, ShardRows(rows, failures, bytes.fromhex(described.sha256)))
        with naming_file(self.path):
            (self.path / "manifest.json").unlink()
            sync_folder(self.path)


def joined_shards(out: str | os.PathLike[str], plan: StorePlan, token: str) -> tuple[ShardWriter, list[str]]:
    """For a process that joins a job which another one holds: a writer for the shards it is given, and in what its machine differs.

    `token` is the holder's StoreWriter.token. Raises StoreError when the folder is not the one that the holder writes to, or when the two
    were given different settings, data or teachers.
    """
    path = Path(out)
    if lock_token(path / "lock") != token:
        raise StoreError(f"{path}: is not the folder that process 0 writes to; every machine must see the same --out, on a disk they share")
    job = plan.job()
    differences = _compare_jobs(_read_sealed(path / "job.json", "delete the folder and label again"), job, path / "job.json")
    return ShardWriter(path, plan, _job_key(job), held_by=token), list(differences)


def _job_key(job: Mapping[str, Any]) -> int:
    """Marks the units of a job: the same for all who work at it, whatever their machines."""
    settings = json.dumps({key: value for key, value in job.items() if key != "provenance"}, sort_keys=True)
    return int.from_bytes(hashlib.sha256(settings.encode()).digest()[:8], "little")


def _compare_jobs(found: Mapping[str, Any], wanted: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Compares a job found in `file` with the one wanted: StoreError for a difference. Those that only warn are returned, as they are noted
    in a manifest (with this job's value), each with its text for people.
    """
    told = {}
    for name, there, here in _differences(found, wanted):
        text = f"{name}: {_short(here)} here, {_short(there)} there"
        if name.split(".")[:2] in (["provenance", "device"], ["provenance", "software"]) or name in (
            "provenance.decoder.version",
            "provenance.resampler.version",
        ):
            told[f"{name}: {_short(here)}"] = text
        elif name.startswith("dataset."):
            raise StoreError(f"{file}: is of another dataset ({name.split('_')[0].removeprefix('dataset.')} differ); choose another --out")
        elif name == "provenance.dataset_fingerprint":
            raise StoreError(
                f"{file}: was begun with other photographs (a name or a size has changed since); restore them, or choose another --out"
            )
        else:
            raise StoreError(f"{file}: another labelling job: {text}; use the same settings, or choose another --out")
    return told


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The settings in which two jobs differ, as (dotted name, found, wanted); keys that only `found` has at its top are not the plan's."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in wanted if not name else sorted({*found, *wanted}):
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        yield name, found, wanted


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
