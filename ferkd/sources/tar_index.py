"""What the headers of tar shards say: where each sample's image lies, and its class as it is written. tars.py says what a sample is.

The headers are read once; the result is kept in the user's cache folder and used as long as every shard has its size and time of change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import stat
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ferkd.classes import some
from ferkd.durable import cache_folder
from ferkd.errors import InputError
from ferkd.manifest import is_inside
from ferkd.sources import IMAGE_EXTENSIONS
from ferkd.store import PathTable

log = logging.getLogger(__name__)

MAGIC = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}
CLASS_BYTES, JSON_BYTES = 1 << 10, 1 << 20  # more is no class
SAY_SECONDS = 10.0
CACHE_FORMAT = 1

_SAMPLE = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class TarIndex:
    """The images of shards, as `SHARD.tar/PATH-IN-IT`, sorted: in which shard each lies (int32 [N]), at which byte and how many bytes
    (int64 [N]), and its class as an index into `labels` (int32 [N]), which are as they are written. `shards`: the files, their sizes and
    times of change (ns). `odd`: lines about samples that were left out."""

    shards: tuple[tuple[Path, int, int], ...]
    paths: PathTable
    shard_of: NDArray[np.int32]
    at: NDArray[np.int64]
    size: NDArray[np.int64]
    label_of: NDArray[np.int32]
    labels: tuple[str, ...]
    odd: tuple[str, ...]


@dataclasses.dataclass
class _Sample:
    """The parts of a sample that count: images and their places by name, and the class as it is written."""

    key: str
    images: dict[str, tuple[str, int, int]] = dataclasses.field(default_factory=dict)
    parts: set[str] = dataclasses.field(default_factory=set)
    label: str | None = None
    described: str | None = None


def _samples(path: Path) -> Iterator[_Sample]:
    """The samples of a shard, in order. Raises InputError for a file that is no tar, is damaged, cut short or hostile."""
    with open(path, "rb") as file:
        start = file.read(8)
        for magic, command in MAGIC.items():
            if start.startswith(magic):
                raise InputError(f"{path}: is compressed; unpack it ({command}): photographs are read at random places")
        file.seek(0)
        sample: _Sample | None = None
        seen: set[int] = set()
        for member in _members(path, file):
            name = member.name.removeprefix("./")
            found = _SAMPLE.fullmatch(name)
            if not found or not member.isfile():  # hidden files, folders; WebDataset passes them over as well
                if found and not member.isdir():
                    raise InputError(
                        f"{path}: {name!r} is no plain file in it but a link or a device; write the shard anew with files alone"
                    )
                continue
            key, extension = found[1], found[2].lower()
            if not is_inside(name.encode("utf-8", "surrogateescape")):
                raise InputError(f"{path}: holds {name!r}, a path that leads out of it or is none; do not trust this tar")
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample
                if hash(key) in seen:
                    raise InputError(
                        f"{path}: the key {key!r} comes twice: a sample's files must lie one after the other, and keys be distinct"
                    )
                seen.add(hash(key))
                sample = _Sample(key)
            if extension in sample.parts:
                raise InputError(f"{path}: has two files {name!r}; a sample has one of each extension: write the shard anew")
            sample.parts.add(extension)
            _take(sample, path, file, name, extension, member)
        if sample is not None:
            yield sample


def _take(sample: _Sample, path: Path, file: IO[bytes], name: str, extension: str, member: tarfile.TarInfo) -> None:
    if f".{extension}" in IMAGE_EXTENSIONS:
        if member.issparse():
            raise InputError(f"{path}: {name!r} is a sparse file, which lies in pieces; write the shard anew without --sparse")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{path}: holds a file whose name is not UTF-8 ({os.fsencode(name)!r}); rename it") from error
        sample.images[extension] = (name, member.offset_data, member.size)
    elif extension == "cls" and member.size <= CLASS_BYTES:
        sample.label = _text(os.pread(file.fileno(), member.size, member.offset_data))
    elif extension == "json" and member.size <= JSON_BYTES:
        sample.described = _described_class(os.pread(file.fileno(), member.size, member.offset_data))


def _text(data: bytes) -> str | None:
    """A class as a text, None where there is none."""
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        return None
    return text if text.isprintable() and text else None


def _described_class(data: bytes) -> str | None:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    label = content.get("label", content.get("class"))
    if isinstance(label, bool) or not isinstance(label, int | str):
        return None
    data = str(label).encode("utf-8", "surrogatepass")
    return _text(data) if len(data) <= CLASS_BYTES else None


def _members(path: Path, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar. Python's own reader takes a damaged header, and an end without its mark, for the end, in silence."""
    size = os.fstat(file.fileno()).st_size
    again, before = "copy it again, or write it anew", -1
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape", encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
                if member.offset <= before or member.size < 0:
                    raise InputError(f"{path}: its header at byte {member.offset:,} leads backwards; do not trust this tar")
                before = member.offset
                yield member
            end = tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError) as error:
        if size == 0 or "unexpected end" not in str(error):
            raise InputError(f"{path}: is no tar, or a damaged one ({str(error) or type(error).__name__}); {again}") from error
        raise InputError(f"{path}: is cut short: it ends at byte {size:,}, in the midst of a file; {again}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), or is a damaged tar; {again}") from error
    block = os.pread(file.fileno(), tarfile.BLOCKSIZE, end)
    if len(block) < tarfile.BLOCKSIZE:
        raise InputError(f"{path}: is cut short: it ends at byte {size:,}, without an end mark; {again}")
    if block.strip(b"\0"):
        raise InputError(f"{path}: its header at byte {end:,} is damaged; {again}")
    while data := os.pread(file.fileno(), 1 << 20, end):
        if data.strip(b"\0"):
            raise InputError(f"{path}: goes on after its end mark at byte {end:,}, as tars that were strung together do; {again}")
        end += len(data)


def _image(sample: _Sample) -> tuple[str, int, int] | str:
    """A sample's image, or what is odd about the sample."""
    if len(sample.images) != 1:
        return f"{len(sample.images)} images ({', '.join(sorted(sample.images))})" if sample.images else "no image"
    if sample.label is None and sample.described is None:
        return "no class"
    return next(iter(sample.images.values()))


def _walk(title: str, shards: Sequence[tuple[Path, int, int]]) -> dict[str, Any]:
    """Reads all headers: the arrays that the cache keeps."""
    names: list[bytes] = []
    where: list[tuple[int, int, int]] = []
    label_of: list[int] = []
    labels: dict[str, int] = {}
    odd: dict[str, list[str]] = {}
    told = time.monotonic()
    for number, (path, *_) in enumerate(shards):
        if time.monotonic() - told > SAY_SECONDS:
            told = time.monotonic()
            log.info("%s: read the headers of %d of %d shards, which is done once", title, number, len(shards))
        for sample in _samples(path):
            image = _image(sample)
            if isinstance(image, str):
                odd.setdefault(image, []).append(f"{path.name}/{sample.key}")
                continue
            label = sample.label if sample.label is not None else sample.described
            assert label is not None
            names.append(f"{path.name}/{image[0]}".encode())
            where.append((number, *image[1:]))
            label_of.append(labels.setdefault(label, len(labels)))
    lines = [f"{len(keys):,} sample(s) with {what} are left out: {some(keys)}" for what, keys in odd.items()]
    if not names:
        raise InputError(f"{title}: no sample with an image and a class: {lines[0] if lines else 'the shards are empty'}")
    order = sorted(range(len(names)), key=names.__getitem__)
    paths = PathTable.from_paths(names[i].decode() for i in order)
    places = np.array(where, np.int64)[order]
    return {
        "blob": np.frombuffer(b"".join(paths.chunks()), np.uint8),
        "offsets": paths.offsets,
        "shard_of": places[:, 0].astype(np.int32),
        "at": places[:, 1],
        "size": places[:, 2],
        "label_of": np.array(label_of, np.int32)[order],
        "text": np.frombuffer(json.dumps({"labels": list(labels), "odd": lines}).encode(), np.uint8),
    }


def read_index(title: str, files: Sequence[Path]) -> TarIndex:
    """The index of shards: from the cache where it is these shards', else by reading their headers.

    Raises InputError for a shard that is no tar, compressed, damaged, cut short or hostile, and where there is no sample at all.
    """
    shards, key = [], hashlib.sha256(f"{CACHE_FORMAT}\n{title}\n".encode("utf-8", "surrogateescape"))
    for file in files:
        try:
            found = os.stat(file)
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror}); make it readable, or remove it") from error
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{file}: is no file; remove it")
        shards.append((file, found.st_size, found.st_mtime_ns))
        key.update(f"{file.name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    place = hashlib.sha256(os.fsencode(files[0].parent.resolve()) + title.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    cache = cache_folder() / f"tars-{place}.npz"
    arrays = _cached(cache, key.digest())
    if arrays is None:
        try:
            arrays = _walk(title, shards)
        except OSError as error:
            raise InputError(f"{error.filename or title}: cannot be read ({error.strerror}); make it readable, or remove it") from error
        _keep(cache, key.digest(), arrays)
    text = json.loads(arrays["text"].tobytes())
    paths = PathTable(arrays["blob"].tobytes(), arrays["offsets"])
    where = arrays["shard_of"], arrays["at"], arrays["size"]
    return TarIndex(tuple(shards), paths, *where, arrays["label_of"], tuple(text["labels"]), tuple(text["odd"]))


def _cached(cache: Path, key: bytes) -> dict[str, NDArray[Any]] | None:
    """A kept index, None when there is none, it is damaged (zip has CRC32s) or it is of other shards."""
    try:
        with np.load(cache, allow_pickle=False) as kept:
            if kept["key"].tobytes() != key:
                return None
            return {name: kept[name] for name in ("blob", "offsets", "shard_of", "at", "size", "label_of", "text")}
    except MemoryError:
        raise
    except Exception:  # whatever a damaged zip makes its readers raise
        return None


def _keep(cache: Path, key: bytes, arrays: dict[str, NDArray[Any]]) -> None:
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):  # no cache, no harm
        cache.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, key=np.frombuffer(key, np.uint8), **arrays)  # type: ignore[arg-type]  # no array is named allow_pickle
        os.replace(temporary, cache)
