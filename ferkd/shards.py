"""Shards while a store is being labelled: units of 64 images that are safe as soon as they are written, then the whole file.

docs/formats.md specifies the files ("Files of a labelling job"). A shard belongs to one process at a time; a store's shards may be
written by many.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from ferkd.durable import lock_token, naming_file, sync_folder, write_all, write_whole
from ferkd.errors import InputError, StoreError
from ferkd.records import MAX_SIDE, label_words

if TYPE_CHECKING:
    from ferkd.store_writing import StorePlan

UNIT_IMAGES = 64

ROW = struct.Struct("<IHHII")  # target, width, height, CRC32 of the photo, CRC32 of block + row + path
_UNIT_HEADER = struct.Struct("<8sQQQIII")  # magic, job, first image, bytes of payload, images, CRC32 of payload, of the header so far
_UNIT_MAGIC = b"ferkdunt"
_ROWS_HEADER = struct.Struct("<8sQQQ32s")  # magic, first image, images, bytes of failures, SHA-256 of the shard
_ROWS_MAGIC = b"ferkdrow"


def shard_file(number: int) -> str:
    """A shard's file, relative to the store."""
    return f"shards/shard-{number:05d}.bin"


@dataclass(frozen=True)
class LabelledImage:
    """One image's answer: size in pixels as cropped, CRC32 of the photo, `box_words` [M] uint64 (None when boxes are replayed) and
    `label_words` [M, W] uint32. `failure`: why the photo could not be read, in words that are the same in every run; then the words
    may be None and width and height are written as 0.
    """

    width: int
    height: int
    photo_crc: int
    box_words: npt.NDArray[np.uint64] | None
    label_words: npt.NDArray[np.uint32] | None
    failure: str | None = None


class ShardRows(NamedTuple):
    """What the index will say of a whole shard: its images' rows, why images failed (image number -> reason), the shard's SHA-256."""

    rows: bytes
    failures: Mapping[str, str]
    sha256: bytes


class ShardWriter:
    """Writes shards of the labelling job of `plan` in the store's folder.

    `job_key` marks units as this job's. `held_by`: the token that must stand in the store's lock at every write, or the job is over. Raises
    StoreError when nothing can be written, or when another process is at work on the same shard.
    """

    def __init__(self, folder: Path, plan: StorePlan, job_key: int, held_by: str | None = None) -> None:
        self.folder, self.plan, self._job_key, self.held_by = folder, plan, job_key, held_by
        self.shards = -(-len(plan.paths) // plan.shard_images)
        self._parts: dict[int, _Part] = {}

    def close(self) -> None:
        """Lets go of the shards that are not finished. What is written stays."""
        for part in self._parts.values():
            part.close()
        self._parts.clear()

    def range(self, shard: int) -> tuple[int, int]:
        """The shard's first and last image."""
        first = shard * self.plan.shard_images
        return first, min(first + self.plan.shard_images, len(self.plan.paths)) - 1

    def file(self, shard: int, suffix: str = ".bin") -> Path:
        return (self.folder / shard_file(shard)).with_suffix(suffix)

    def is_whole(self, shard: int) -> bool:
        """Whether the shard's file is there and of its size."""
        first, last = self.range(shard)
        file = self.file(shard)
        return file.exists() and file.stat().st_size == (last + 1 - first) * self.plan.image_bytes

    def is_done(self, shard: int) -> bool:
        """Whether nothing is left to do for the shard. One that was cut short since counts as not begun, with a warning."""
        rows = self.file(shard, ".rows")
        if not rows.exists():
            return False
        if self.is_whole(shard):
            return True
        warnings.warn(f"{self.file(shard)}: is not the whole shard any more: it is labelled again", stacklevel=5)
        with naming_file(rows):
            rows.unlink()
        return False

    def next_image(self, shard: int) -> int:
        """The first image of an unfinished shard that is not safe yet; the one after the last when all are."""
        part = self._parts.get(shard)
        if part is None:
            part = self._part(shard)
            part.close()
        return part.next

    def _part(self, shard: int) -> _Part:
        return _Part(self.file(shard, ".part"), self._job_key, *self.range(shard))

    def write_unit(self, shard: int, images: Sequence[LabelledImage], first: int | None = None) -> None:
        """Appends the shard's next images: 64, or the shard's last ones. They are safe when this returns.

        `first`: the number of the first of them, to be checked. Raises InputError for another number of images or words of a wrong shape,
        and StoreError when nothing can be written, or when it is not `first` that is missing; then nothing of the unit counts as written.
        """
        part = self._parts.get(shard)
        if part is None:
            if not 0 <= shard < self.shards or self.is_done(shard):
                raise InputError(f"shard: {shard} is not missing; ask missing()")
            part = self._parts[shard] = self._part(shard)
        if first is not None and first != part.next:
            raise StoreError(
                f"{part.path}: has the images before {part.next:,}, and was thought to have those before {first:,}: another process has "
                "written to it meanwhile; start the same command again"
            )
        wanted = min(UNIT_IMAGES, part.last + 1 - part.next)
        if len(images) != wanted:
            raise InputError(f"images: {len(images)}; the next unit of shard {shard} has {wanted}")
        rows, blocks, failures = [], [], {}
        for number, image in enumerate(images, part.next):
            block = self._block(image, number)
            size = (0, 0) if image.failure is not None else (image.width, image.height)
            start = ROW.pack(int(self.plan.targets[number]), *size, image.photo_crc, 0)[:12]
            crc = zlib.crc32(self.plan.paths.raw(number), zlib.crc32(start, zlib.crc32(block)))
            rows.append(start + struct.pack("<I", crc))
            blocks.append(block)
            if image.failure is not None:
                failures[str(number)] = image.failure
        self._check_held()
        part.append(len(images), b"".join([*rows, *blocks, _failures_json(failures)]))

    def _check_held(self) -> None:
        if self.held_by is not None and lock_token(self.folder / "lock") != self.held_by:
            raise StoreError(
                f"{self.folder / 'lock'}: is no longer this job's: its first process has ended, or another job has begun; "
                "what is labelled so far is kept: start the same command again to go on"
            )

    def _block(self, image: LabelledImage, number: int) -> bytes:
        """The image's bytes in its shard: boxes, then labels; zeros when it failed."""
        plan = self.plan
        if image.failure is not None:
            return bytes(plan.image_bytes)
        if not (1 <= image.width <= MAX_SIDE and 1 <= image.height <= MAX_SIDE):
            raise InputError(f"image {number}: {image.width} x {image.height} pixels; sides from 1 to {MAX_SIDE:,} can be stored")
        shape = (plan.crops, label_words(plan.label_codec, plan.k, plan.classes))
        labels, boxes = image.label_words, image.box_words
        if labels is None or labels.shape != shape or labels.dtype != np.uint32:
            raise InputError(
                f"image {number}: label_words must be uint32 {shape}, not {None if labels is None else (labels.dtype, labels.shape)}"
            )
        if plan.box_codec == "replayed":
            return np.ascontiguousarray(labels, "<u4").tobytes()
        if boxes is None or boxes.shape != shape[:1] or boxes.dtype != np.uint64:
            raise InputError(
                f"image {number}: box_words must be uint64 {shape[:1]}, not {None if boxes is None else (boxes.dtype, boxes.shape)}"
            )
        return np.ascontiguousarray(boxes, "<u8").tobytes() + np.ascontiguousarray(labels, "<u4").tobytes()

    def finish_shard(self, shard: int) -> None:
        """Turns a shard whose units are all written into its file. Raises InputError when units are missing."""
        if self.is_done(shard):
            return
        last = self.range(shard)[1]
        part = self._parts.pop(shard, None) or self._part(shard)
        try:
            if part.next <= last:
                raise InputError(f"shard: {shard} lacks images {part.next} to {last}; write their units first")
            rows: list[bytes] = []
            failures: dict[str, str] = {}
            digest = hashlib.sha256()

            def blocks() -> Iterator[bytes]:
                for images, payload in part.units():
                    end = images * (ROW.size + self.plan.image_bytes)
                    rows.append(payload[: images * ROW.size])
                    failures.update(json.loads(payload[end:] or b"{}"))
                    block = payload[images * ROW.size : end]
                    digest.update(block)
                    yield block

            self._check_held()
            write_whole(self.file(shard), blocks())
            self.write_rows(shard, ShardRows(b"".join(rows), failures, digest.digest()))
        finally:
            part.close()
        with naming_file(part.path):
            part.path.unlink()

    def write_rows(self, shard: int, found: ShardRows) -> None:
        """Writes a shard's .rows: with it and its .bin the shard is done."""
        first, last = self.range(shard)
        why = _failures_json(found.failures)
        text = _ROWS_HEADER.pack(_ROWS_MAGIC, first, last + 1 - first, len(why), found.sha256) + found.rows + why
        write_whole(self.file(shard, ".rows"), [text, zlib.crc32(text).to_bytes(4, "little")])

    def read_rows(self, shard: int) -> ShardRows:
        """Reads a shard's .rows. Raises StoreError when it is damaged."""
        path = self.file(shard, ".rows")
        first, last = self.range(shard)
        with naming_file(path):
            text = path.read_bytes()
        whole = len(text) > _ROWS_HEADER.size and zlib.crc32(text[:-4]) == int.from_bytes(text[-4:], "little")
        if not whole or _ROWS_HEADER.unpack_from(text)[:3] != (_ROWS_MAGIC, first, last + 1 - first):
            raise StoreError(f"{path}: is damaged; delete it and run the same ferkd label command to label this shard again")
        rows_end = _ROWS_HEADER.size + ROW.size * (last + 1 - first)
        failures: dict[str, str] = json.loads(text[rows_end:-4] or b"{}")
        return ShardRows(text[_ROWS_HEADER.size : rows_end], failures, _ROWS_HEADER.unpack_from(text)[4])


def _failures_json(failures: Mapping[str, str]) -> bytes:
    """Why images failed, image number -> reason, in the numbers' order; nothing at all when none did."""
    ordered = {image: failures[image] for image in sorted(failures, key=int)}
    return json.dumps(ordered, separators=(",", ":")).encode() if ordered else b""


class _Part:
    """A shard's units: checksummed, appended one by one. What follows the last whole unit is cut off."""

    def __init__(self, path: Path, job: int, first: int, last: int) -> None:
        self.path, self._job, self.first, self.last = path, job, first, last
        self._fd = -1
        self._is_locked = False
        if path.exists():
            with naming_file(path):
                self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._measure()

    def _measure(self) -> None:
        self.next, self._size = self.first, 0
        for images, payload in self.units():
            self.next += images
            self._size += _UNIT_HEADER.size + len(payload)

    def units(self) -> Iterator[tuple[int, bytes]]:
        """(images, payload) of the whole units, in order, up to the first that is cut short or damaged."""
        at, image = 0, self.first
        while image <= self.last and self._fd >= 0:
            head = os.pread(self._fd, _UNIT_HEADER.size, at)
            if len(head) < _UNIT_HEADER.size:
                return
            magic, job, first, size, images, payload_crc, head_crc = _UNIT_HEADER.unpack(head)
            if (magic, job, first, head_crc) != (_UNIT_MAGIC, self._job, image, zlib.crc32(head[:-4])):
                return
            payload = os.pread(self._fd, size, at + _UNIT_HEADER.size)
            if len(payload) != size or zlib.crc32(payload) != payload_crc:
                return
            yield images, payload
            image += images
            at += _UNIT_HEADER.size + size

    def append(self, images: int, payload: bytes) -> None:
        head = _UNIT_HEADER.pack(_UNIT_MAGIC, self._job, self.next, len(payload), images, zlib.crc32(payload), 0)[:-4]
        with naming_file(self.path):
            self._lock()
            try:
                os.ftruncate(self._fd, self._size)
                os.lseek(self._fd, self._size, os.SEEK_SET)
                write_all(self._fd, head + zlib.crc32(head).to_bytes(4, "little") + payload)
                os.fsync(self._fd)
            except OSError:
                with contextlib.suppress(OSError):  # best effort: what is left of the unit would be cut off later anyway
                    os.ftruncate(self._fd, self._size)
                raise
        self._size += _UNIT_HEADER.size + len(payload)
        self.next += images

    def _lock(self) -> None:
        """Takes the file for this process alone: one that outlived its job must not write beside the next job's."""
        if self._is_locked:
            return
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            sync_folder(self.path.parent)
        size = self._size
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._is_locked = True
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise StoreError(
                    f"{self.path}: another process is still at work on this shard; let it finish or stop it, then start again"
                ) from None
            return  # a file system without locks: the store's own lock has to do
        self._measure()
        if self._size != size:
            raise StoreError(f"{self.path}: another process has written to it meanwhile; start the same command again")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
