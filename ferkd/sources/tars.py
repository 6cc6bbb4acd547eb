"""Tar shards as WebDataset writes them: DIR/train/*.tar and DIR/val/*.tar, or DIR/*train*.tar and DIR/*val*.tar.

A sample is the files of a shard that share a key, which is a name up to the first dot of its last part, and lie one after the other. Its
image is the part whose extension is that of an image (`jpg`); its class stands in `cls` (a number or a text), or in `json` under "label" or
"class". Numbers are class indices (see classes.class_mapping).

Training visits photographs at random, and WebDataset's own reading is a stream, which gives them in the order of the shards. So the tars'
headers are read once (tar_index.py), and a photograph is then one pread of its bytes where they lie: nothing is unpacked, and the tars must
be local and uncompressed.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ferkd.errors import InputError, SourceLost
from ferkd.sources import Kind, Split, SplitName
from ferkd.sources.classes import classes_of
from ferkd.sources.tar_index import TarIndex, read_index
from ferkd.store import PathTable

log = logging.getLogger(__name__)

COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".lz4")
OPEN_SHARDS = 64


@dataclasses.dataclass(frozen=True)
class TarShards:
    """A dataset of tar shards."""

    root: Path

    def has(self, split: SplitName) -> bool:
        return bool(self._shards(split))

    def photos(self, split: SplitName) -> TarPhotos:
        return TarPhotos(self._title(split), self._index(split))

    def scan(self, split: SplitName) -> Split:
        index = self._index(split)
        for line in index.odd:
            log.warning("%s: %s", self._title(split), line)
        return Split(TarPhotos(self._title(split), index), index.paths, *classes_of(index.labels, index.label_of))

    def _title(self, split: SplitName) -> str:
        return f"wds:{self.root} ({split})"

    def _index(self, split: SplitName) -> TarIndex:
        shards = self._shards(split)
        if not shards:
            raise InputError(
                f"wds:{self.root}: has no tar shards of {split}; put them in {self.root / split}/*.tar, "
                f"or name them {self.root}/*{split}*.tar"
            )
        return read_index(self._title(split), shards)

    def _shards(self, split: SplitName) -> list[Path]:
        """The split's shards, sorted. Raises InputError when it is not clear which these are, or when they are compressed."""
        if not self.root.is_dir():
            raise InputError(f"wds:{self.root}: no such folder; give the folder that holds the tar shards")
        inside = _names(self.root / split) if (self.root / split).is_dir() else []
        flat = [name for name in _names(self.root) if split in name.lower()]
        other = "val" if split == "train" else "train"
        for name in flat:
            if other in name.lower():
                raise InputError(
                    f"{self.root / name}: is it of train or of val? Its name says both; "
                    f"put the shards into {self.root}/train and {self.root}/val"
                )
        if inside and flat:
            raise InputError(
                f"wds:{self.root}: has shards of {split} in {self.root / split} and beside it ({flat[0]}); which? Move one set away"
            )
        folder, names = (self.root / split, inside) if inside else (self.root, flat)
        for name in names:
            if not name.endswith(".tar"):
                raise InputError(
                    f"{folder / name}: is compressed; photographs are read at random places, and a compressed file only from its start: "
                    "unpack it to a plain .tar (gzip -d, xz -d, zstd -d): JPEGs hardly grow"
                )
        return [folder / name for name in names]


def _names(folder: Path) -> list[str]:
    """The names of tars in a folder, compressed ones too, sorted."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); make it readable") from error
    ends = (".tar", *(f".tar{end}" for end in COMPRESSED), *(end for end in COMPRESSED if end.startswith(".t")))
    found = [name for name in names if name.endswith(ends) and not name.startswith(".")]
    for name in found:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{folder}: holds a tar whose name is not UTF-8 ({os.fsencode(name)!r}); rename it") from error
    return found


class TarPhotos:
    """The photographs that an index says. Pickles as the index's arrays; files are opened when they are first read from, by every process
    anew."""

    kind: Kind = "wds"

    def __init__(self, title: str, index: TarIndex) -> None:
        self.title, self.index = title, index
        self._open: dict[int, _OpenTar] = {}

    def __reduce__(self) -> tuple[type[TarPhotos], tuple[str, TarIndex]]:
        return TarPhotos, (self.title, self.index)

    def __str__(self) -> str:
        return self.title

    def name(self, path: str) -> str:
        return os.path.join(self.index.shards[0][0].parent, path)

    def read(self, path: str) -> bytes:
        image = self._number(path)
        if image is None:
            raise InputError(f"{self.name(path)}: cannot be read: there is no such file in the shard")
        shard = self._shard(int(self.index.shard_of[image]))  # held by name, or another thread could make it close before the read
        at, size = int(self.index.at[image]), int(self.index.size[image])
        try:
            data = os.pread(shard.fd, size, at)
        except OSError as error:
            raise SourceLost(f"{self.name(path)}: cannot be read: {error.strerror}", str(shard.path)) from error
        if len(data) != size:
            raise SourceLost(f"{self.name(path)}: cannot be read: the shard ends at {at + len(data):,}", str(shard.path))
        return data

    def __contains__(self, path: str) -> bool:
        return self._number(path) is not None

    def sizes(self, paths: PathTable) -> Iterator[int]:
        return iter(self.index.size.tolist())

    def described(self) -> dict[str, Any]:
        return {"kind": self.kind, "shards": len(self.index.shards)}

    def _number(self, path: str) -> int | None:
        try:
            return self.index.paths.index_of(path)
        except InputError:
            return None

    def _shard(self, number: int) -> _OpenTar:
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = _OpenTar(*self.index.shards[number])
            for oldest in list(self._open)[:-OPEN_SHARDS]:
                self._open.pop(oldest, None)
        return shard


class _OpenTar:
    """A file descriptor that lives as long as somebody uses it: one thread may forget a shard while another reads it."""

    __slots__ = ("fd", "path")

    def __init__(self, path: Path, size: int, changed_ns: int) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceLost(f"{path}: cannot be opened: {error.strerror}", str(path)) from error
        found = os.fstat(self.fd)
        if (found.st_size, found.st_mtime_ns) != (size, changed_ns):
            raise SourceLost(f"{path}: was changed since its headers were read ({size:,} bytes then, {found.st_size:,} now)", str(path))

    def __del__(self) -> None:
        try:  # noqa: SIM105  at the end of the program contextlib may be gone before this is
            os.close(self.fd)
        except (AttributeError, OSError):
            pass
