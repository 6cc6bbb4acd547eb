"""The photographs of a folder as tar shards and as a dataset of Hugging Face, in the same order."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ferkd.sources import scan_split

SPLITS = {"train": "train", "val": "val"}


def images_of(data: Path, split: str) -> list[tuple[str, str, bytes]]:
    """(path, class, bytes) of a folder's images, in ferkd's order."""
    found = scan_split(data, split)
    return [(path, found.folders[folder], found.photos.read(path)) for path, folder in zip(found.paths, found.folder_of, strict=True)]


def write_tar(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    """A plain tar of these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample_files(images: Sequence[tuple[str, str, bytes]], label: str = "cls") -> list[tuple[str, bytes]]:
    """A sample a photograph, its class in `.cls` or in `.json`."""
    files = []
    for path, name, data in images:
        key = path.rpartition(".")[0]
        files.append((path, data))
        files.append((f"{key}.cls", f"{name}\n".encode()) if label == "cls" else (f"{key}.json", json.dumps({"label": name}).encode()))
    return files


def write_shards(data: Path, out: Path, shards: int = 3, label: str = "cls") -> Path:
    """out/{train,val}/NNN.tar of the photographs of `data`, one after the other."""
    for split in SPLITS:
        images = images_of(data, split)
        each = -(-len(images) // shards)
        for number in range(shards):
            part = images[number * each : (number + 1) * each]
            write_tar(out / split / f"{number:03d}.tar", sample_files(part, label))
    return out


def hub_rows(data: Path, split: str, names: Sequence[str]) -> Any:
    """A datasets.Dataset of the photographs, encoded, with a ClassLabel of these names."""
    import datasets

    images = images_of(data, split)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names)), "note": datasets.Value("string")}
    )
    rows = {
        "image": [{"bytes": content, "path": path} for path, _, content in images],
        "label": [list(names).index(name) for _, name, _ in images],
        "note": [path for path, _, _ in images],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def write_hub(data: Path, out: Path, names: Sequence[str] = ("red", "green", "blue")) -> Path:
    """What save_to_disk writes of both splits."""
    import datasets

    datasets.DatasetDict({"train": hub_rows(data, "train", names), "validation": hub_rows(data, "val", names)}).save_to_disk(str(out))
    return out
