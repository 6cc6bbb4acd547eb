"""Small made-up datasets and stores for the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from ferkd.crops import CropSettings, draw_crops
from ferkd.records import BoxCodec, LabelCodec, pack_boxes, pack_labels
from ferkd.sources import read_photo, scan_split
from ferkd.store import LabelledImage, LabelStore, StorePlan, StoreWriter

COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}


def write_photos(root: Path, train: int = 8, val: int = 4, seed: int = 0) -> Path:
    """root/{train,val}/{blue,green,red}/N.png: noisy pictures of 24 to 48 pixels in the colour of their class."""
    random = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = random.integers(24, 49, 2)
                pixels = np.clip(np.array(colour) + random.normal(0, 40, (height, width, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def answers(rows: int, classes: int, k: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A made-up teacher: ids [rows, k] and falling probabilities of all degrees of confidence."""
    logits = random.normal(0, 1, (rows, classes)) * random.uniform(0.2, 6.0, (rows, 1))
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    ids = np.argsort(-probs, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(probs, ids, 1)


def write_store(
    data: Path,
    out: Path,
    *,
    crops: int = 12,
    k: int = 2,
    seed: int = 0,
    classes: tuple[str, ...] = ("blue", "green", "red"),
    unreadable: int | None = None,
    compact: bool = False,
) -> LabelStore:
    """A store over data/train with made-up answers. `unreadable`: the number of an image that counts as one that could not be read."""
    split = scan_split(data, "train")
    folders = {name: classes.index(name) for name in split.folders}
    targets = np.array([folders[split.folders[f]] for f in split.folder_of])
    settings = CropSettings(seed=seed)
    codecs: tuple[BoxCodec, LabelCodec] = ("replayed", "packed") if compact else ("stored", "half")
    plan = StorePlan(split.paths, targets, crops, k, classes, folders, *codecs, settings, 16, 1.0, {})
    random = np.random.default_rng(seed)
    with StoreWriter(out, plan) as writer:
        for shard, first, last in writer.missing():
            images = []
            for image in range(first, last + 1):
                if image == unreadable:
                    images.append(LabelledImage(0, 0, 0, None, None, "made up to be unreadable"))
                    continue
                photo = read_photo(split.photos, split.paths[image])
                height, width = photo.image.shape[1:]
                boxes = None if compact else pack_boxes(*draw_crops(settings, image, np.arange(crops), width, height))
                labels = pack_labels(*answers(crops, len(classes), k, random), codecs[1], len(classes))
                images.append(LabelledImage(width, height, photo.crc, boxes, labels))
            writer.write_unit(shard, images)
            writer.finish_shard(shard)
        return writer.finish()


def tiny_net(num_classes: int) -> tuple[nn.Module, dict[str, object]]:
    """A student for 16-pixel pictures, `python:photos:tiny_net`."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )
    return net, {"input_size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def plain_net(num_classes: int) -> tuple[nn.Module, dict[str, object]]:
    """The same without BatchNorm, whose statistics depend on how a batch is shared out."""
    net, described = tiny_net(num_classes)
    assert isinstance(net, nn.Sequential)
    del net[1]
    return net, described


def dropping_net(num_classes: int) -> tuple[nn.Module, dict[str, object]]:
    """The same with dropout, whose random state a resumed run must continue."""
    net, described = tiny_net(num_classes)
    assert isinstance(net, nn.Sequential)
    net.insert(5, nn.Dropout(0.3))
    return net, described


def four_outputs(num_classes: int) -> tuple[nn.Module, dict[str, object]]:
    """A student that does not listen."""
    return tiny_net(4)


def failing_net(num_classes: int) -> tuple[nn.Module, dict[str, object]]:
    """A student that cannot be run on its own input size."""
    return nn.Linear(5, num_classes), {"input_size": 16}


class _ByColour(nn.Module):
    """A teacher that compares a picture's mean colour with those of the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("colours", torch.tensor(list(COLOURS.values())) / 255.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -20.0 * torch.cdist(images.mean((2, 3)), self.colours)


def colour_teacher() -> tuple[nn.Module, dict[str, object]]:
    """A teacher for write_photos, `python:photos:colour_teacher`."""
    return _ByColour(), {"input_size": 16, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "classes": list(COLOURS)}
