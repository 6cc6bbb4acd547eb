"""What `compact` costs beside `exact`: bytes, and how far its labels are from those, over a store that a real teacher made.

    python bench/bench_compact.py                             writes ${OUT:-bench/results}/compact.csv
    python bench/bench_compact.py EXACT COMPACT               two stores that differ in --layout alone
    python bench/bench_compact.py --train 5 --work DIR        trains students on either; ${OUT:-bench/results}/compact-train.csv

Without stores it labels FERKD_TEST_DATA/imagenette-mini-224 twice with EfficientNet-Lite0 (tests/lite0_teacher.py): --photos of them,
--crops each. Boxes are compared one by one; labels by the KL divergence of exact from compact over the k classes and the rest, by the
first answer, and by what FerKD's rule makes of them under a policy.

--train labels CIFAR-10 (FERKD_TEST_DATA) with ResNet-56, or without it the demo's digits with the demo's teacher, in both layouts. From
every seed one student learns from each store: the same initial weights, images and crops in the same order, so that they differ in
what the labels were rounded to and in what grows from it. The spread over seeds says how much that is; the mean of the paired
differences has its 95 % interval (t). DIR keeps what is done, and the same command goes on with it.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import machine
from bench.convergence.paired import EXTEND_HALF_WIDTH, paired_difference, spread
from ferkd.labeling import LabelSettings, label
from ferkd.recipes import TrainConfig, small_images
from ferkd.regions import RegionPolicy, region_of
from ferkd.store import LabelStore
from ferkd.train import Job, train

LAYOUTS = ("exact", "compact")

POLICIES = {"max 0.1/0.5": RegionPolicy(0.1, 0.5), "max 0.3/0.7": RegionPolicy(0.3, 0.7)}


def make(folder: Path, photos: int, crops: int) -> list[LabelStore]:
    """The same crops with the same teacher, in both layouts."""
    sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))
    data = Path(os.environ["FERKD_TEST_DATA"]) / "imagenette-mini-224"
    stores = []
    for layout in LAYOUTS:
        settings = LabelSettings(
            data, "python:lite0_teacher:make", folder / layout, crops, layout=layout, limit=photos, skip_preflight=True
        )
        store = label(settings)
        assert store is not None
        stores.append(store)
    return stores


def compare(exact: LabelStore, compact: LabelStore) -> dict[str, float]:
    """Everything that differs. Raises SystemExit when the two do not hold the same crops."""
    crops = np.arange(exact.crops)
    kl, first_error, first, order, sums = [], [], [], [], []
    moved = dict.fromkeys(POLICIES, 0)
    for image in range(len(exact)):
        one, other = exact.read(image), compact.read(image)
        if (one.path, one.photo_crc, one.width) != (other.path, other.photo_crc, other.width):
            raise SystemExit(f"image {image}: {one.path} and {other.path} are not the same photograph")
        if one.width == 0:
            continue
        for a, b in zip(one.boxes(crops), other.boxes(crops), strict=True):
            if (a != b).any():
                raise SystemExit(f"{one.path}: its boxes differ")
        (ids, p), (other_ids, q) = exact.unpack(one.label_words), compact.unpack(other.label_words)
        # The order of near ties may differ: compared by id.
        by_id, other_by_id = np.argsort(ids, 1), np.argsort(other_ids, 1)
        same_ids = (np.take_along_axis(ids, by_id, 1) == np.take_along_axis(other_ids, other_by_id, 1)).all(1)
        if not same_ids.all():
            raise SystemExit(f"{one.path}: other classes were kept")
        first.append(ids[:, 0] == other_ids[:, 0])
        order.append((ids == other_ids).all(1))
        first_error.append(np.abs(p[:, 0] - q[:, 0]))
        sums.append(q.astype(np.float64).sum(1))
        p64, q64 = (np.take_along_axis(x, at, 1).astype(np.float64) for x, at in ((p, by_id), (q, other_by_id)))
        p64, q64 = (np.concatenate([x, np.maximum(1 - x.sum(1, keepdims=True), 2.0**-12)], 1) for x in (p64, q64))
        kl.append((np.where(p64 > 0, p64 * np.log(np.maximum(p64, 1e-300) / np.maximum(q64, 1e-9)), 0) - p64 + q64).sum(1))
        for name, policy in POLICIES.items():
            regions = [region_of(torch.from_numpy(x[:, 0].copy()), policy) for x in (p, q)]
            moved[name] += int((regions[0] != regions[1]).sum())
    all_kl, errors = np.concatenate(kl), np.concatenate(first_error)
    return {
        "crops": len(all_kl),
        "exact_bytes": exact.manifest.crop_bytes,
        "compact_bytes": compact.manifest.crop_bytes,
        "kl_mean": float(all_kl.mean()),
        "kl_p99": float(np.quantile(all_kl, 0.99)),
        "kl_largest": float(all_kl.max()),
        "first_probability_mean_error": float(errors.mean()),
        "first_probability_largest_error": float(errors.max()),
        "first_answer_same": float(np.concatenate(first).mean()),
        "all_answers_in_order": float(np.concatenate(order).mean()),
        "largest_sum": float(np.concatenate(sums).max()),
        **{f"crops_in_another_region, {name}": count for name, count in moved.items()},
    }


@dataclasses.dataclass(frozen=True)
class Trial:
    """What students are trained on: `data` holds train and val, `stores` the two layouts' labels of its train."""

    data: Path
    stores: dict[str, Path]
    student: str
    config: TrainConfig


def prepare_trial(work: Path, epochs: float | None, photos: int) -> Trial:
    """Images, teacher and both stores, made in `work` if they are not there yet."""
    test_data = os.environ.get("FERKD_TEST_DATA")
    if test_data:
        from bench.convergence.datasets import Images, prepare
        from bench.convergence.settings import TEACHERS

        data, teacher = prepare(Images("cifar10"), work, Path(test_data)), TEACHERS["resnet56"]
        asked = LabelSettings(data, teacher.spec, work, 10, limit=photos, scale=(0.35, 1.0), batch_size=128, autocast="bf16")
        assert teacher.weights is not None
        asked = dataclasses.replace(asked, teacher_weights=Path(test_data) / teacher.weights)
        student = "python:bench.convergence.models:small_student"
        config = dataclasses.replace(small_images(), epochs=epochs or 12.0, image_size=32, lr=0.2, amp="bf16")
    else:
        from ferkd.demo import write_digits

        data, student = work / "digits", "python:ferkd.demo:small_student"
        if not data.exists():
            aside = work / "digits.tmp"
            write_digits(aside)
            aside.rename(data)
        config = dataclasses.replace(small_images(), epochs=epochs or 20.0, image_size=32, batch_size=64, crops_per_image=1, flip=False)
        if not (work / "teacher" / "summary.json").exists():
            alone = dataclasses.replace(config, epochs=24.0, min_scale=0.35)  # the demo's, whatever the students take
            train(Job(data, "python:ferkd.demo:small_teacher", work / "teacher", alone, resume="auto"))
        asked = LabelSettings(data, f"run:{work / 'teacher'}", work, 40, flip=False)
    stores = {layout: work / "labels" / layout for layout in LAYOUTS}
    for layout in LAYOUTS:
        label(dataclasses.replace(asked, out=stores[layout], layout=layout))
    config = dataclasses.replace(config, workers=0, eval_every=2 * config.epochs)
    return Trial(data, stores, student, config)


def train_both(trial: Trial, seeds: int, work: Path) -> list[dict[str, object]]:
    """A row a student: seed, layout, top-1 at the end. Runs that are finished in `work` are not run again."""
    rows: list[dict[str, object]] = []
    for seed in range(seeds):
        for layout, store in trial.stores.items():
            run = work / "runs" / f"{layout}-seed{seed}"
            config = dataclasses.replace(trial.config, seed=seed)
            if (run / "summary.json").exists():
                summary = json.loads((run / "summary.json").read_text())
            else:
                summary = train(Job(trial.data, trial.student, run, config, store, resume="auto", say=lambda _: None))
            rows.append({"seed": seed, "layout": layout, "top1": summary["top1"], "steps": summary["steps"]})
            print(f"seed {seed}, {layout}: top-1 {summary['top1']:.2%}", flush=True)
    return rows


def verdict(rows: list[dict[str, object]]) -> list[str]:
    """The spread of either layout over the seeds, the paired difference, and what follows from it."""
    top1 = {layout: {int(str(row["seed"])): float(str(row["top1"])) for row in rows if row["layout"] == layout} for layout in LAYOUTS}
    lines = []
    for layout, values in top1.items():
        mean, deviation, n = spread(list(values.values()))
        lines.append(f"{layout:<8} top-1 {mean:.2%}, standard deviation {deviation:.2%}, {n} seeds")
    difference = paired_difference(top1["compact"], top1["exact"])
    assert difference is not None
    low, high = difference.mean - difference.half_width, difference.mean + difference.half_width
    lines.append(f"compact - exact: {100 * difference.mean:+.2f} points, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}")
    margin = f"{100 * EXTEND_HALF_WIDTH:.1f} points"
    if low > -EXTEND_HALF_WIDTH and high < EXTEND_HALF_WIDTH:
        lines.append(f"equal within {margin}")
    elif low <= 0 <= high:
        lines.append(f"no difference found, but one of {margin} is not excluded: train more seeds")
    else:
        lines.append("they differ")
    return lines


def train_and_say(seeds: int, epochs: float | None, photos: int, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    trial = prepare_trial(work.resolve(), epochs, photos)
    rows = train_both(trial, seeds, work.resolve())
    print("\n".join(verdict(rows)))
    more = {
        "student": trial.student,
        "data": trial.data.name,
        "epochs": trial.config.epochs,
        "device": machine.processor(),
        "torch": torch.__version__,
    }
    write_csv("compact-train.csv", [{**row, **more} for row in rows])


def write_csv(name: str, rows: list[dict[str, object]]) -> None:
    out = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    out.mkdir(parents=True, exist_ok=True)
    with open(out / name, "w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    print(f"wrote {out / name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stores", nargs="*", type=Path)
    parser.add_argument("--photos", type=int, help="to label; default 1,000, with --train 10,000 of CIFAR-10")
    parser.add_argument("--crops", type=int, default=10)
    parser.add_argument("--train", type=int, default=0, metavar="SEEDS", help="train so many students on either store, at least 2")
    parser.add_argument("--epochs", type=float, help="of each student of --train")
    parser.add_argument("--work", type=Path, help="where --train keeps images, labels and runs; default: thrown away")
    options = parser.parse_args()
    if options.train:
        if options.train < 2:
            parser.error(f"--train: {options.train}; an interval needs at least 2 seeds")
        if options.stores:
            parser.error("--train makes its own stores: leave out EXACT and COMPACT")
        with tempfile.TemporaryDirectory() as name:
            train_and_say(options.train, options.epochs, options.photos or 10_000, options.work or Path(name))
        return
    with tempfile.TemporaryDirectory() as name:
        stores = [LabelStore(path) for path in options.stores] or make(Path(name), options.photos or 1000, options.crops)
        found = compare(*stores)
        device = stores[0].manifest.provenance.get("device", {}).get("name", machine.processor())
    for key, value in found.items():
        print(f"{key:<40} {value:>12,.3g}" if isinstance(value, float) else f"{key:<40} {value:>12,}")
    write_csv("compact.csv", [{**{key: f"{value:.6g}" for key, value in found.items()}, "device": device}])


if __name__ == "__main__":
    main()
