"""Top-1 and top-5 on the validation split, every image once."""

from __future__ import annotations

import logging
import os
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from ferkd.classes import class_mapping
from ferkd.data import UNREADABLE, CenterViews, evaluation_loader, loaded
from ferkd.distributed import Ranks
from ferkd.errors import InputError
from ferkd.normalise import Normalise
from ferkd.preprocessing import Preprocessing
from ferkd.sources import scan_split
from ferkd.teacher import LoadedModel

log = logging.getLogger(__name__)


class Accuracy(NamedTuple):
    """Shares of the evaluated images, from 0 to 1. `top1_folders` chooses only among the classes that have a folder. `unreadable`: images
    that are not among the evaluated ones because they cannot be read."""

    top1: float
    top5: float
    top1_folders: float
    images: int
    unreadable: int = 0


def evaluate_model(loaded: LoadedModel, data: str | os.PathLike[str], batch_size: int = 64, workers: int | None = None) -> Accuracy:
    """Evaluate a trained run or a teacher on DATA/val. Raises InputError when its classes and the class folders do not fit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    val = scan_split(data, "val")
    mapping = class_mapping(val.folders, loaded.class_names, loaded.outputs, val.numbers)
    folder_classes = np.array([mapping[folder] for folder in val.folders])
    preprocessing = loaded.preprocessing
    views = CenterViews(val, folder_classes, preprocessing.input_size, preprocessing.crop_pct, preprocessing.interpolation)
    return evaluate(loaded.model.to(device), views, preprocessing, folder_classes, device, batch_size=batch_size, workers=workers)


@torch.no_grad()  # not inference_mode: what a student makes here and keeps could not be trained with afterwards
def evaluate(
    model: nn.Module,
    views: Dataset[Any],
    preprocessing: Preprocessing,
    folder_classes: np.ndarray,
    device: torch.device,
    *,
    batch_size: int,
    workers: int | None = None,
    prefetch: int | None = None,
    amp: torch.dtype | None = None,
    ranks: Ranks | None = None,
) -> Accuracy:
    """Top-1 and top-5 over evaluation views (pixels uint8 [3, S, S], class id, number).

    `folder_classes`: the class ids that have a folder, for `top1_folders`. `prefetch`: batches that each worker may be ahead, for which the
    caller knows that shared memory has room; None: as many as fit. `amp`: the autocast dtype, None for float32. With `ranks` every process
    looks at its own share of the images and all return the same figures.
    """
    model.eval()
    normalise = Normalise(preprocessing.input_size, preprocessing.mean, preprocessing.std, device)
    has_folder = torch.from_numpy(np.unique(folder_classes)).to(device)
    hits = torch.zeros(3, dtype=torch.int64, device=device)
    images, unreadable = torch.zeros(2, dtype=torch.int64, device=device)
    is_decoded = isinstance(views, TensorDataset)
    names = views.name if isinstance(views, CenterViews) else "image {}".format
    if ranks is not None and ranks.world > 1:
        views = Subset(views, range(ranks.rank, len(views), ranks.world))  # type: ignore[arg-type]
    if is_decoded:
        workers = 0
    elif workers is None:
        workers = min(8, max(0, (os.cpu_count() or 1) - 1))
    for pixels, targets, numbers in loaded(evaluation_loader(views, batch_size, workers, prefetch)):
        if (targets == UNREADABLE).any():
            for number in numbers[targets == UNREADABLE].tolist():
                log.warning("%s: cannot be read, so left out of the evaluation", names(number))
            unreadable += int((targets == UNREADABLE).sum())
            pixels, targets = pixels[targets != UNREADABLE], targets[targets != UNREADABLE]
            if len(targets) == 0:
                continue
        target = targets.to(device)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            logits = model(normalise(pixels.to(device))).float()
        ahead = _ahead_of(logits, target)
        place, among = ahead.sum(1), ahead[:, has_folder].sum(1)
        hits += torch.stack([(place == 0).sum(), (place < 5).sum(), (among == 0).sum()])
        images += len(target)
    if ranks is not None:
        ranks.sum(hits)
        ranks.sum(images)
        ranks.sum(unreadable)
    if not images:
        raise InputError(f"val: none of its {int(unreadable):,} images can be read")
    top1, top5, among_folders = (hits.double() / images).tolist()
    return Accuracy(top1, top5, among_folders, int(images), int(unreadable))


def _ahead_of(logits: Tensor, target: Tensor) -> Tensor:
    """bool [B, C]: the classes that a model with `logits` [B, C] prefers to `target` [B]; of equal ones the first, as argmax does.

    Logits of 8 significant bits (bfloat16) are often equal, and topk orders equal ones as it likes. Where a logit is NaN, every class
    is ahead: such an answer is never right.
    """
    own = logits.gather(1, target[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < target[:, None]
    return (logits > own) | ((logits == own) & before) | logits.isnan().any(1, keepdim=True)
