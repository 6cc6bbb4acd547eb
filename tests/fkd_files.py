"""FKD's label files, made as its generator makes them, and read as its training script reads them: our own code for both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ferkd.crops import CropSettings, draw_crops
from ferkd.interop.fkd import generator_name
from ferkd.sources import scan_split

CLASSES, CROPS = 12, 6
FKD_TYPES = ("hard", "smoothing", "marginal_smoothing_k5", "marginal_smoothing_k10", "marginal_renorm_k5", "dense")


def fkd_labels(probs: np.ndarray, label_type: str) -> np.ndarray:
    """The labels array of distributions [M, C]."""
    if label_type == "dense":
        return probs.astype(np.float32)
    best = np.argsort(-probs, axis=1, kind="stable")
    if label_type == "hard":
        return best[:, 0]
    k = {"smoothing": 1, "marginal_smoothing_k10": 10}.get(label_type, 5)
    pairs = np.stack([best[:, :k], np.take_along_axis(probs, best[:, :k], 1)], 1).astype(np.float32)
    return pairs[:, :, 0] if k == 1 else pairs


def write_fkd(file: Path, boxes: np.ndarray, flips: np.ndarray, labels: np.ndarray, size: tuple[int, int], half: bool = False) -> None:
    """One file: boxes [M, 4] (left, top, width, height) of a photo of `size` (width, height); `half` as with FKD's --use_fp16."""
    left, top, wide, tall = boxes.T
    coords = np.stack([top / size[1], left / size[0], tall / size[1], wide / size[0]], 1).astype(np.float32)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save([np.float16(coords), flips, np.float16(labels)] if half else [coords, flips, labels], file)


def distributions(image: int, classes: int = CLASSES, crops: int = CROPS) -> np.ndarray:
    """The made-up teacher's answer for each crop [M, C] float32, the truth (image's third) often on top."""
    random = np.random.default_rng(image)
    logits = random.normal(0, 2, (crops, classes))
    logits[:, image // 4 % 3] += 3
    probs = np.exp(logits - logits.max(1, keepdims=True))
    return (probs / probs.sum(1, keepdims=True)).astype(np.float32)


def write_labels(data: Path, folder: Path, label_type: str, half: bool = False, classes: int = CLASSES) -> Path:
    """FKD's files for all of data/train; returns `folder`, which holds `train`."""
    split = scan_split(data, "train")
    for image, path in enumerate(split.paths):
        with Image.open(split.photos.root / path) as photo:
            size = photo.size
        boxes, flips = draw_crops(CropSettings(3), image, np.arange(CROPS), *size)
        write_fkd(folder / generator_name(path), boxes, flips, fkd_labels(distributions(image, classes), label_type), size, half)
    return folder


def read_as_fkd(
    folder: Path, path: str, size: tuple[int, int], label_type: str, classes: int, weights_only: bool = True
) -> tuple[list[tuple[int, ...]], list[bool], np.ndarray]:
    """What FKD's training script makes of train/`path`: the pixels (left, top, right, bottom) it cuts, flips, labels [M, C] float32.

    It looks for the path's last three parts, cut at the first dot; multiplies shares by the photo's size; Pillow then rounds the corners.
    """
    name = "/".join(("train/" + path).split("/")[-3:]).split(".")[0]
    coords, flips, labels = torch.load(folder / f"{name}.tar", map_location="cpu", weights_only=weights_only)
    boxes, width, height = [], *size
    for crop in range(len(labels)):
        top, left = coords[crop][0].item() * height, coords[crop][1].item() * width
        tall, wide = coords[crop][2].item() * height, coords[crop][3].item() * width
        boxes.append((round(left), round(top), round(left + wide), round(top + tall)))
    labels = torch.as_tensor(labels)
    dense = torch.empty(len(labels), classes)
    if label_type == "hard":
        dense = torch.nn.functional.one_hot(labels.long(), classes).float()
    elif label_type == "dense":
        dense = labels.float()
    else:
        pairs = labels.float()[:, :, None] if label_type == "smoothing" else labels.float()
        k = pairs.shape[2]
        dense[:] = ((1 - pairs[:, 1].sum(1)) / (classes - k))[:, None]
        dense.scatter_(1, pairs[:, 0].long(), pairs[:, 1])
    return boxes, [bool(flip == True) for flip in flips], dense.numpy()  # noqa: E712 (as the script compares)
