"""The experiments' image folders, DIR/train/CLASS/NAME and DIR/val/CLASS/NAME, made from the test data: the same bytes every time.

A source is written once. Its variants (some ground truth made wrong, a tenth of train held out for tuning, fewer images) are hard
links into it, and every image keeps its name, which no other image of its split has: by it labels find their image again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from ferkd.sources import Split, scan_split

HELD_OUT = 0.1
"""The share of train that tuning may look at."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Which images a run is trained and evaluated on."""

    source: str
    """A name in SOURCES."""
    wrong: float = 0.0
    """The share of each class's train images that lie in another class's folder."""
    held_out: bool = False
    """Whether val is the held-out tenth of train (as wrong as the rest), and train what is left."""
    share: float = 1.0
    """The share of each class's train images that are there at all."""

    @property
    def name(self) -> str:
        parts = [self.source]
        parts += [f"wrong{self.wrong:g}"] if self.wrong else []
        parts += [f"share{self.share:g}"] if self.share < 1 else []
        parts += ["tuning"] if self.held_out else []
        return "-".join(parts)


Writer = Callable[[Path, Path], None]
"""Writes a source's train and val: (folder of the test data, folder to fill)."""


def write_cifar10(data: Path, out: Path) -> None:
    """The tiles of the sheets as PPM files, whose bytes depend on no library's compression: train/CLASS/NUMBER.ppm, val the test set."""
    index = json.loads((data / "cifar10-jpg95" / "index.json").read_text())
    for split, prefix in (("train", "train"), ("val", "test")):
        number = 0
        for sheet in sorted(name for name in index["sheets"] if name.startswith(prefix)):
            pixels = np.array(Image.open(data / "cifar10-jpg95" / sheet).convert("RGB"))
            tiles = pixels.reshape(50, 32, 50, 32, 3).transpose(0, 2, 1, 3, 4).reshape(2500, 32, 32, 3)
            for tile, label in zip(tiles, index["sheets"][sheet], strict=True):
                folder = out / split / index["classes"][label]
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{number:05d}.ppm").write_bytes(b"P6 32 32 255\n" + tile.tobytes())
                number += 1


def unpack_imagenette(data: Path, out: Path) -> None:
    with tarfile.open(data / "imagenette-128.tar.gz") as archive:
        archive.extractall(out, filter="data")
    for split in ("train", "val"):
        (out / "imagenette-128" / split).rename(out / split)
    shutil.rmtree(out / "imagenette-128")


SOURCES: dict[str, Writer] = {"cifar10": write_cifar10, "imagenette": unpack_imagenette}


def prepare(images: Images, work: Path, data: Path) -> Path:
    """The folder of `images` below WORK/data, made if it is not there yet, with all it depends on."""
    out = work / "data" / images.name
    if out.exists():
        return out
    if images == Images(images.source):
        with whole_folder(out) as begun:
            SOURCES[images.source](data, begun)
        return out
    source = prepare(Images(images.source), work, data)
    train = scan_split(source, "train")
    with whole_folder(out) as begun:
        for image in range(len(train)):
            (begun / "train" / train.folders[train.folder_of[image]]).mkdir(parents=True, exist_ok=True)
        if images.held_out:
            for folder in train.folders:
                (begun / "val" / folder).mkdir(parents=True)
        else:
            shutil.copytree(source / "val", begun / "val", copy_function=os.link)
        for image, folder, split in _placed(train, images):
            os.link(train.photos.root / train.paths[image], begun / split / folder / Path(train.paths[image]).name)
    return out


def _placed(train: Split, images: Images) -> Iterator[tuple[int, str, str]]:
    """(number of the image in the source's train, its class folder, its split) for the images that are there.

    Decided class by class from the hash of each image's name, so that the choice is the same everywhere and on fewer images a subset.
    """
    names = [Path(path).name for path in train.paths]
    for number, folder in enumerate(train.folders):
        members = np.flatnonzero(train.folder_of == number).tolist()
        wrong, held_out, there = (
            set(sorted(members, key=lambda image, purpose=purpose: _hash(purpose, names[image]))[: round(share * len(members))])
            for purpose, share in (("wrong", images.wrong), ("held out", HELD_OUT if images.held_out else 0.0), ("there", images.share))
        )
        for image in members:
            if image in there:
                others = [other for other in train.folders if other != folder]
                told = others[_hash("class", names[image]) % len(others)] if image in wrong else folder
                yield image, told, "val" if image in held_out else "train"


def _hash(purpose: str, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}:{name}".encode()).digest()[:8], "little")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out` when the block ends, and never in part."""
    begun = out.with_name(f"{out.name}.begun")
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir(parents=True)
    yield begun
    begun.rename(out)
