"""The rule's premise, counted in the stores: where does the teacher err, and do the regions find it?

    python -m bench.convergence.why --work DIR       the stores in DIR of FerKD's runs -> bench/results/convergence-why.csv

Counted by region, by band of confidence and by crop scale: how often the teacher's first answer is what the folder says, how often it is
what the image shows (which differs where ground truth was made wrong), how often the folder is right, and the mean of the teacher's
largest probability.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.convergence.run import made
from bench.convergence.settings import Arm
from bench.convergence.studies import STUDIES
from ferkd.inspection import BANDS, SCALES
from ferkd.regions import Region, confidence_of, region_of
from ferkd.store import LabelStore

COLUMNS = ("store", "source", "wrong", "teacher", "min_scale", "discard_below", "calibrate_below", "confidence", "by", "group", "crops",
           "teacher_as_told", "teacher_true", "told_true", "mean_max")  # fmt: skip


def counted(arm: Arm, store: LabelStore, truth: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Rows for an arm's store under its policy. `truth`: image name -> the class folder that it belongs to."""
    assert arm.labels is not None
    policy = arm.method.policy
    columns = [np.concatenate(parts) for parts in zip(*_crops(arm, store, truth), strict=True)]
    confidence, scale, as_told, true, told_true, highest = columns
    region = region_of(torch.from_numpy(confidence), policy).numpy()
    band = np.minimum((confidence * BANDS).astype(int), BANDS - 1)
    place = np.digitize(scale, SCALES[1:-1])
    same = {
        "store": arm.labels.name, "source": arm.images.source, "wrong": arm.images.wrong, "teacher": arm.labels.labelling.teacher,
        "min_scale": arm.min_scale, "discard_below": policy.discard_below, "calibrate_below": policy.calibrate_below,
        "confidence": policy.confidence,
    }  # fmt: skip
    groups = (
        ("region", region, {int(value): value.name.lower() for value in Region}),
        ("confidence", band, {i: f"{i / BANDS:.2f}-{(i + 1) / BANDS:.2f}" for i in range(BANDS)}),
        ("scale", place, {i: f"{SCALES[i]:.2f}-{SCALES[i + 1]:.2f}" for i in range(len(SCALES) - 1)}),
    )
    for by, group_of, names in groups:
        for value, name in names.items():
            inside = group_of == value
            if inside.any():
                shares = zip(COLUMNS[-4:], (as_told, true, told_true, highest), strict=True)
                yield {**same, "by": by, "group": name, "crops": int(inside.sum()), **{n: f"{v[inside].mean():.4f}" for n, v in shares}}


def stores_and_policies(arms: Iterable[Arm]) -> list[Arm]:
    """Of FerKD's arms on whole sets one for each store and policy, whatever the budget and the mixing."""
    asked = (a for a in arms if a.labels is not None and a.method.name.startswith("FerKD (") and not a.varied and not a.images.held_out)
    return list({(a.labels, a.method.policy): a for a in asked}.values())


def _crops(arm: Arm, store: LabelStore, truth: dict[str, str]) -> Iterator[Sequence[np.ndarray]]:
    """Of an image's crops [M]: confidence, scale, whether the teacher says what the folder says, and what is true, whether the folder does,
    and the teacher's largest probability."""
    numbers = np.arange(store.crops)
    for image in range(len(store)):
        labels = store.read(image)
        ids, probs = store.unpack(labels.label_words)
        target = torch.full((store.crops,), labels.target)
        confidence = confidence_of(torch.from_numpy(ids), torch.from_numpy(probs), target, store.classes, arm.method.policy.confidence)
        boxes, _ = labels.boxes(numbers)
        true = store.folders[truth[Path(labels.path).name]]
        scale = boxes[:, 2].astype(np.float64) * boxes[:, 3] / (labels.width * labels.height)
        told_true = np.full(store.crops, labels.target == true)
        yield confidence.numpy(), scale, ids[:, 0] == labels.target, ids[:, 0] == true, told_true, probs[:, 0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results" / "convergence-why.csv")
    options = parser.parse_args()
    rows = []
    for arm in stores_and_policies(arm for study in made(list(STUDIES.values()), options.out.parent) for arm in study.arms):
        assert arm.labels is not None
        path = options.work / "labels" / arm.labels.name
        source = options.work / "data" / arm.images.source / "train"
        if (path / "manifest.json").exists() and source.is_dir():
            print(f"{path.name}: {arm.method.name}", flush=True)
            truth = {image.name: image.parent.name for image in source.glob("*/*")}
            rows += list(counted(arm, LabelStore(path), truth))
    if not rows:
        print(f"{options.work}: holds no store of a FerKD run yet", file=sys.stderr)
        return 1
    aside = options.out.with_suffix(".tmp")
    with open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(aside, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
