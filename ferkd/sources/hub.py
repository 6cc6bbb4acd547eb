"""Hugging Face datasets: hf:NAME[@REVISION] of the Hub, or hf:DIR, a folder that `datasets` understands: one that save_to_disk wrote, or
parquet files, or an imagefolder.

Columns are found by their features: the one Image column; the one ClassLabel column, or else one named label. Splits: train; and for val
the first of validation, val and test that there is. `?image=COLUMN&label=COLUMN&train=SPLIT&val=SPLIT&config=NAME` names them, and
`classes=numbers` takes a ClassLabel's numbers for the classes' names.

A photograph is named by split and row, `train/000000123`. The rows lie in Arrow files, mapped into memory; images are taken as the encoded
bytes that they are there, and decoded as files are.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from ferkd.classes import ClassNumbers, some
from ferkd.errors import ABOUT_THE_FILE, InputError, SourceLost, one_line
from ferkd.sources import Kind, Split, SplitName
from ferkd.sources.classes import classes_of
from ferkd.store import PathTable

VAL_NAMES = ("validation", "val", "test")
LABEL_NAMES = ("label", "labels", "class", "cls", "target")
OPTIONS = ("image", "label", "train", "val", "config", "classes")
ROW_DIGITS = 9
CHUNK = 4096  # rows

_COMMIT = re.compile(r"@([0-9a-f]{40})/")


@dataclasses.dataclass(frozen=True)
class HubDataset:
    """A dataset as it is named: `name` of the Hub or of a folder."""

    name: str
    revision: str | None = None
    image: str | None = None
    label: str | None = None
    train: str = "train"
    val: str | None = None
    config: str | None = None
    classes: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubDataset:
        """Reads what follows `hf:`. Raises InputError for an option that there is none of."""
        name, mark, query = text.partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        unknown = [option for option, value in options.items() if option not in OPTIONS or not value]
        if unknown or (mark and not options) or options.get("classes", "numbers") != "numbers":
            raise InputError(
                f"hf:{text}: says {unknown[0] if unknown else query!r} after its question mark; it may say "
                f"{', '.join(f'{option}=' for option in OPTIONS[:-1])} and classes=numbers, joined by &"
            )
        if name.startswith("//"):
            raise InputError(f"hf:{text}: is the place of files; a dataset is named hf:OWNER/NAME, or hf:DIR on this machine")
        revision = None
        if not _is_local(name):
            name, _, revision = name.partition("@")
        if not name:
            raise InputError(f"hf:{text}: names no dataset; give hf:NAME or hf:DIR")
        return cls(os.path.expanduser(name) if _is_local(name) else name, revision or None, **options)

    def __str__(self) -> str:
        return f"hf:{self.name}" + (f"@{self.revision}" if self.revision else "")

    @functools.cached_property
    def _splits(self) -> dict[str, Any]:
        """The dataset's own splits, each a datasets.Dataset, by name."""
        local = _is_local(self.name)
        if local and not os.path.isdir(self.name):
            raise InputError(f"{self}: no such folder; give a folder that `datasets` understands, or the NAME of a dataset of the Hub")
        datasets = _library()
        if local and any((Path(self.name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
            loaded = self._load(datasets.load_from_disk, self.name)
        else:
            loaded = self._load(
                datasets.load_dataset, os.path.abspath(self.name) if local else self.name, self.config, revision=self.revision
            )
        return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}

    def _load(self, load: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return load(*arguments, **options)
        except MemoryError:
            raise
        except Exception as error:  # the library and those below it raise what they like
            raise InputError(f"{self}: cannot be loaded: {one_line(error)}") from error

    def has(self, split: SplitName) -> bool:
        return self._split_name(split) is not None

    def photos(self, split: SplitName) -> HubPhotos:
        rows, name = self._rows(split)
        return self._photos(rows, name)

    def scan(self, split: SplitName) -> Split:
        rows, name = self._rows(split)
        photos = self._photos(rows, name)
        folders, folder_of, numbers = self._classes(rows, f"{self} ({name})")
        return Split(photos, photos.paths(), folders, folder_of, numbers)

    def _split_name(self, split: SplitName) -> str | None:
        """The dataset's own name for a split: the one given, or the one found."""
        if split == "train":
            return self.train
        return self.val or next((name for name in VAL_NAMES if name in self._splits), None)

    def _rows(self, split: SplitName) -> tuple[Any, str]:
        """The rows of a split (a datasets.Dataset), and its own name for it."""
        there, name = self._splits, self._split_name(split)
        if name is None or not (name in there or _is_slice(name)):
            asked = name or " or ".join(VAL_NAMES)
            raise InputError(f"{self}: has no split {asked}, only {some(list(there))}; say which with ?{split}=SPLIT")
        if name in there:
            rows = there[name]
        else:
            place = os.path.abspath(self.name) if _is_local(self.name) else self.name
            rows = self._load(_library().load_dataset, place, self.config, revision=self.revision, split=name)
        if len(rows) == 0:
            raise InputError(f"{self} ({name}): has no rows")
        if len(rows) >= 10**ROW_DIGITS:
            raise InputError(f"{self} ({name}): has {len(rows):,} rows; fewer than {10**ROW_DIGITS:,} can be named")
        return rows, name

    def _photos(self, rows: Any, split: str) -> HubPhotos:
        datasets = _library()
        column = self.image or _image_column(rows, f"{self} ({split})")
        if column not in rows.features:
            raise InputError(f"{self} ({split}): has no column {column!r}, only {some(list(rows.features))}")
        try:
            images = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        except Exception as error:  # whatever Arrow makes of a column that is none of images
            raise InputError(
                f"{self} ({split}): its column {column!r} holds no images ({one_line(error)}); say which with ?image=COLUMN"
            ) from error
        commit = next((found[1] for url in rows.info.download_checksums or {} if (found := _COMMIT.search(url))), self.revision)
        described = {
            "name": None if _is_local(self.name) else self.name,
            "config": self.config,
            "revision": commit,
            "split": split,
            "image": column,
        }
        return HubPhotos(f"{self} ({split})", split, images.with_format(None), column, described)

    def _classes(self, rows: Any, title: str) -> tuple[tuple[str, ...], NDArray[np.int32], ClassNumbers | None]:
        """Split's `folders`, `folder_of` and `numbers`."""
        datasets = _library()
        column = self.label or _label_column(rows, title)
        if column not in rows.features:
            raise InputError(f"{title}: has no column {column!r}, only {some(list(rows.features))}")
        feature = rows.features[column]
        values = rows.select_columns([column]).with_format("arrow")[:].column(column)
        if values.null_count:
            raise InputError(
                f"{title}: {values.null_count:,} of {len(rows):,} rows have no {column!r}; choose another split or another column"
            )
        kind = str(values.type)
        if not (kind.startswith(("int", "uint")) or kind in ("string", "large_string")):
            raise InputError(
                f"{title}: its column {column!r} holds {kind}, and a class is a number or a text; say which with ?label=COLUMN"
            )
        distinct = values.combine_chunks().dictionary_encode()
        labels = distinct.dictionary.to_pylist()
        label_of = distinct.indices.to_numpy(zero_copy_only=False).astype(np.int32)
        negative = [label for label in labels if isinstance(label, int) and label < 0]
        if negative:
            count = int(np.isin(label_of, [labels.index(label) for label in negative]).sum())
            raise InputError(
                f"{title}: {count:,} of {len(rows):,} rows have no class ({column} is {negative[0]}), as test sets do; "
                f"name a split that has them, with ?val=SPLIT"
            )
        if not isinstance(feature, datasets.ClassLabel) or self.classes == "numbers":
            odd = [label for label in labels if not str(label).strip() or not str(label).isprintable()]
            if odd:
                raise InputError(f"{title}: {odd[0]!r} in column {column!r} is no class's name")
            return classes_of([str(label) for label in labels], label_of)
        if max(labels) >= feature.num_classes:
            raise InputError(f"{title}: has class {max(labels)} in column {column!r}, which names {feature.num_classes:,} classes only")
        named = [feature.int2str(label) for label in labels]
        folders = tuple(sorted(named))
        if len(set(folders)) < len(folders):
            raise InputError(f"{title}: names two classes the same in column {column!r}; take their numbers with ?classes=numbers")
        place = {name: i for i, name in enumerate(folders)}
        folder_of = np.array([place[name] for name in named], np.int32)[label_of]
        numbers = ClassNumbers(dict(zip(named, labels, strict=True)), feature.num_classes, bare=False)
        return folders, folder_of, numbers


class HubPhotos:
    """The rows of a split, `images` (a datasets.Dataset of one column), as SPLIT/ROW. Pickles as the names of its Arrow files."""

    kind: Kind = "hf"

    def __init__(self, title: str, split: str, images: Any, column: str, described: dict[str, Any]) -> None:
        self.title, self.split, self.images, self.column, self._described = title, split, images, column, described

    def __str__(self) -> str:
        return self.title

    def name(self, path: str) -> str:
        return f"{self.title}: {path}"

    def paths(self) -> PathTable:
        """The names of all rows, in order."""
        return PathTable.from_paths(f"{self.split}/{row:0{ROW_DIGITS}d}" for row in range(len(self.images)))

    def read(self, path: str) -> bytes:
        row = self._row(path)
        if row is None:
            raise InputError(f"{self.name(path)}: cannot be read: there is no such row")
        try:
            found = self.images[row][self.column]
            if found is not None and found["bytes"] is not None:
                data: bytes = found["bytes"]
                return data
            if found is not None and found["path"] is not None:
                with open(found["path"], "rb") as file:
                    return file.read()
        except OSError as error:
            text = f"{self.name(path)}: cannot be read: {error.strerror or one_line(error)}"
            if error.errno is not None and error.errno not in ABOUT_THE_FILE:
                raise SourceLost(text, error.filename or self.name(path), error.strerror or one_line(error)) from error
            folder = os.path.dirname(error.filename or "")
            if folder and not os.path.isdir(folder):
                raise SourceLost(text, folder) from error
            raise InputError(text) from error
        raise InputError(f"{self.name(path)}: cannot be read: there is no image in the row")

    def __contains__(self, path: str) -> bool:
        return self._row(path) is not None

    def sizes(self, paths: PathTable) -> Iterator[int]:
        """Of images that the rows hold, their bytes; of those that they point to, the files' (0 of one that is not there)."""
        import pyarrow.compute

        arrow = self.images.with_format("arrow")
        for first in range(0, len(self.images), CHUNK):
            for chunk in arrow[first : first + CHUNK].column(self.column).chunks:
                lengths = pyarrow.compute.binary_length(chunk.field("bytes")).to_pylist()
                for length, path in zip(lengths, chunk.field("path").to_pylist(), strict=True):
                    yield _file_size(path) if length is None else length

    def described(self) -> dict[str, Any]:
        return {"kind": self.kind, **self._described}

    def _row(self, path: str) -> int | None:
        split, _, row = path.rpartition("/")
        if split != self.split or len(row) != ROW_DIGITS or not (row.isascii() and row.isdigit()) or int(row) >= len(self.images):
            return None
        return int(row)


def _file_size(path: str | None) -> int:
    try:
        return os.stat(path).st_size if path else 0
    except OSError:
        return 0


def _is_local(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or os.path.isdir(name)


def _is_slice(split: str) -> bool:
    """Whether a split is a part of one, as `datasets` writes it: train[:90%], or train+validation."""
    return "[" in split or "+" in split


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "hf: datasets of Hugging Face need their library, which is not installed; pip install 'ferkd[datasets]'"
        ) from error
    return datasets


def _image_column(rows: Any, title: str) -> str:
    datasets = _library()
    columns: list[str] = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    columns = columns or [name for name in rows.features if name in ("image", "img", "jpg", "png")]
    if len(columns) != 1:
        raise InputError(
            f"{title}: has {len(columns) or 'no'} columns of images{f' ({some(columns)})' if columns else ''}; "
            f"say which with ?image=COLUMN: there are {some(list(rows.features))}"
        )
    return columns[0]


def _label_column(rows: Any, title: str) -> str:
    datasets = _library()
    columns: list[str] = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    columns = columns or [name for name in LABEL_NAMES if name in rows.features][:1]
    if len(columns) != 1:
        raise InputError(
            f"{title}: has {len(columns) or 'no'} columns of classes{f' ({some(columns)})' if columns else ''}; "
            f"say which with ?label=COLUMN: there are {some(list(rows.features))}"
        )
    return columns[0]
