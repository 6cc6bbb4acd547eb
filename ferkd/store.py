"""A store of labels: a folder of manifest, image index and shards. docs/formats.md specifies every byte.

LabelStore reads; StoreWriter (store_writing.py) writes. Nothing here is ever unpickled, and every read is checked against a CRC32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ferkd.crops import CropSettings, draw_crops, drawn_quickly, unpacked_quickly
from ferkd.errors import StoreError
from ferkd.manifest import INDEX_HEADER, INDEX_MAGIC, VERSION, file_sha256, is_inside, read_manifest
from ferkd.manifest import PathTable as PathTable
from ferkd.records import Records, label_words, top_probabilities, unpack_labels
from ferkd.remote import fetched, is_cached, plainly, url_of
from ferkd.shards import ROW, shard_file
from ferkd.shards import LabelledImage as LabelledImage
from ferkd.store_writing import StorePlan as StorePlan
from ferkd.store_writing import StoreWriter as StoreWriter
from ferkd.store_writing import images_a_shard as images_a_shard

if TYPE_CHECKING:
    from ferkd.regions import Confidence, RegionPolicy

_ROW_DTYPE = np.dtype([("target", "<u4"), ("width", "<u2"), ("height", "<u2"), ("photo_crc", "<u4"), ("crc", "<u4")])
_U4, _U8 = np.dtype("<u4"), np.dtype("<u8")
_OPEN_SHARDS = 256
_SCAN_CROPS = 1 << 16


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
            raise StoreError(f"{path}: is missing; {_mend(path)}") from error
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error
        _check_size(path, os.fstat(self.fd).st_size, size)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.fd)


def _mend(path: Path, otherwise: str = "fetch it again, or delete it and run the same ferkd label command to rebuild it") -> str:
    """What to do about a damaged file of a store."""
    return "delete it and start again: it is then fetched anew" if is_cached(path) else otherwise


def _check_size(path: Path, found: int, expected: int) -> None:
    if found < expected:
        raise StoreError(f"{path}: {found:,} bytes, the manifest says {expected:,}: the copy was cut short; {_mend(path)}")
    if found > expected:
        raise StoreError(f"{path}: {found:,} bytes, the manifest says {expected:,}: it is not this store's file; {_mend(path)}")


class LabelStore:
    """A finished store, opened for reading. Safe in forked and spawned workers and in threads; it pickles as its path.

    Opening reads the manifest and maps the index, whatever the store's size. Raises StoreError, which names the file, for a store
    that is missing, unfinished, edited, of another format version, or that lacks a shard or part of one.

    `path` may be an address (https://..., s3://..., hf://datasets/OWNER/NAME): see remote.py. `path` is then the local copy's; `source` is
    what was given, without credentials.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        url = url_of(path)
        self.path = Path(path) if url is None else fetched(url)
        self.source = plainly(path)
        if not (self.path / "manifest.json").is_file():
            if not self.path.is_dir():
                raise StoreError(f"{self.path}: no such folder; give the folder that ferkd label wrote")
            if (self.path / "job.json").is_file():
                raise StoreError(f"{self.path}: labelling was not finished; run the same ferkd label command again to finish it")
            raise StoreError(f"{self.path}: has no manifest.json: this is not a store of labels; give the folder that ferkd label wrote")
        self.manifest = read_manifest(self.path)
        self._open_index()
        for shard in self.manifest.shards:
            try:
                size = os.stat(self.path / shard.file).st_size
            except FileNotFoundError as error:
                raise StoreError(f"{self.path / shard.file}: is missing; {_mend(self.path)}") from error
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

    def __reduce__(self) -> tuple[Callable[[Path, str], LabelStore], tuple[Path, str]]:
        return _opened, (self.path, self.source)

    def __len__(self) -> int:
        return self.manifest.images

    def __repr__(self) -> str:
        return f"LabelStore({self.source!r}: {len(self):,} images x {self.crops} crops, k={self.k} of {self.classes} classes)"

    @property
    def exif_applied(self) -> bool:
        """Whether photos are turned by their EXIF orientation before the boxes are cut."""
        return bool(self.manifest.provenance.get("decoder", {}).get("apply_exif", True))

    def _open_index(self) -> None:
        m, path = self.manifest, self.path / "index.bin"
        again = _mend(path, "fetch it again; without it the store must be labelled again into another folder")
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != m.index.bytes or size < INDEX_HEADER.size:
                    raise StoreError(f"{path}: {size:,} bytes, the manifest says {m.index.bytes:,}: the copy was cut short; {again}")
                self._index = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise StoreError(f"{path}: is missing; {again}") from error
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error
        found = INDEX_HEADER.unpack_from(self._index)
        self._rows_at = INDEX_HEADER.size + 8 * (m.images + 1)
        self._paths_at = self._rows_at + ROW.size * m.images
        if found != (INDEX_MAGIC, VERSION, ROW.size, m.images, m.index.bytes - self._paths_at):
            raise StoreError(f"{path}: its header says {found}, which does not fit the manifest's {m.images:,} images; {again}")
        offsets: npt.NDArray[np.uint64] = np.frombuffer(self._index, "<u8", m.images + 1, INDEX_HEADER.size)
        self.paths = PathTable(self._index, offsets, self._paths_at, str(path))
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
                f"{expected:08x} that index.bin says: one of the two files was changed; {_mend(self.path)}"
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
                yield images, self.confidence(words[: len(images)].reshape(-1, self.label_width), self.targets[images], kind)
            if progress:
                progress(min(first + step, n), n)

    def confidence(self, words: npt.NDArray[np.uint32], targets: npt.NDArray[np.integer[Any]], kind: Confidence) -> npt.NDArray[np.float32]:
        """The confidence of every crop of some images, float32 [n, M], from their label words [n x M, W] and ground truth [n]."""
        if kind == "max":
            return top_probabilities(words, self.label_codec, self.k, self.classes).reshape(-1, self.crops)
        import torch

        from ferkd.regions import confidence_of

        ids, probs = (torch.from_numpy(part) for part in self.unpack(words))
        target = torch.from_numpy(targets.astype(np.int64)).repeat_interleave(self.crops)
        confidence: npt.NDArray[np.float32] = confidence_of(ids, probs, target, self.classes, kind).numpy()
        return confidence.reshape(-1, self.crops)

    def check_integrity(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Reads every byte of the store and compares all hashes. Raises StoreError that names each damaged file, and images where possible.

        `progress` is called with the number of files done and the number of all.
        """
        m = self.manifest
        damage = []
        for number, shard in enumerate((m.index, *m.shards)):
            path = self.path / shard.file
            if file_sha256(path) != shard.sha256:
                bad = self._damaged_images(number - 1) if number else []
                of = f" ({len(bad):,} images: {', '.join(bad[:3])}{' ...' if len(bad) > 3 else ''})" if bad else ""
                damage.append(f"{path}: its SHA-256 is not what the manifest says{of}")
            if progress:
                progress(number + 1, len(m.shards) + 1)
        if damage:
            raise StoreError("; ".join(damage) + f"; {_mend(self.path)}")

    def _damaged_images(self, shard: int) -> list[str]:
        first = shard * self.manifest.shard_images
        damaged = []
        for image in range(first, first + self.manifest.shards[shard].images):
            try:
                self.read(image)
            except StoreError:
                damaged.append(self.paths[image])
        return damaged


def _opened(path: Path, source: str) -> LabelStore:
    store = LabelStore(path)
    store.source = source
    return store


def _read_scan(cache: Path, key: bytes, images: int) -> PolicyScan | None:
    """A kept scan, or None when there is none, it is damaged or it is of another store."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data: npt.NDArray[np.uint8] = np.load(cache, allow_pickle=False)
        text = data.tobytes()
    except MemoryError:
        raise
    except Exception:  # what a damaged header makes of NumPy's parser: SyntaxError, TokenError ...
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
