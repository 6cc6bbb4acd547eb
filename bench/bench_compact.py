"""What `compact` costs beside `exact`: bytes, and how far its labels are from those, over a store that a real teacher made.

    python bench/bench_compact.py                             writes ${OUT:-bench/results}/compact.csv
    python bench/bench_compact.py EXACT COMPACT               two stores that differ in --layout alone

Without stores it labels FERKD_TEST_DATA/imagenette-mini-224 twice with EfficientNet-Lite0 (tests/lite0_teacher.py): --photos of them,
--crops each. Boxes are compared one by one; labels by the KL divergence of exact from compact over the k classes and the rest, by the
first answer, and by what FerKD's rule makes of them under a policy.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import machine
from ferkd.labeling import LabelSettings, label
from ferkd.regions import RegionPolicy, region_of
from ferkd.store import LabelStore

POLICIES = {"max 0.1/0.5": RegionPolicy(0.1, 0.5), "max 0.3/0.7": RegionPolicy(0.3, 0.7)}


def make(folder: Path, photos: int, crops: int) -> list[LabelStore]:
    """The same crops with the same teacher, in both layouts."""
    sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))
    data = Path(os.environ["FERKD_TEST_DATA"]) / "imagenette-mini-224"
    stores = []
    for layout in ("exact", "compact"):
        settings = LabelSettings(
            data, "python:lite0_teacher:make", folder / layout, crops, layout=layout, limit=photos, skip_preflight=True
        )  # type: ignore[arg-type]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stores", nargs="*", type=Path)
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--crops", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        stores = [LabelStore(path) for path in options.stores] or make(Path(name), options.photos, options.crops)
        found = compare(*stores)
        device = stores[0].manifest.provenance.get("device", {}).get("name", machine.processor())
    for key, value in found.items():
        print(f"{key:<40} {value:>12,.3g}" if isinstance(value, float) else f"{key:<40} {value:>12,}")
    out = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "compact.csv", "w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=[*found, "device"])
        table.writeheader()
        table.writerow({**{key: f"{value:.6g}" for key, value in found.items()}, "device": device})
    print(f"wrote {out / 'compact.csv'}")


if __name__ == "__main__":
    main()
