"""The benchmarks of labelling and of `compact` run, and say what they claim to say."""

import csv
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_teachers import GREYS

from bench import bench_compact, bench_labeling
from ferkd.labeling import LabelSettings, label
from ferkd.store import LabelStore


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for i, level in enumerate(GREYS):
        (root / f"train/g{i}").mkdir(parents=True)
        for number in range(16):
            noise = np.random.default_rng(number).normal(level, 30, (20, 24, 3))
            Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).save(root / f"train/g{i}/{number}.png")
    return root


def test_labelling_is_timed_beside_the_bare_teacher(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(
        sys, "argv", ["bench_labeling.py", "--data", str(photos), "--teacher", "python:tiny_teachers:grey", "--turns", "1", "--crops", "2"]
    )
    bench_labeling.main()
    (file,) = tmp_path.glob("labeling-*.csv")
    with open(file, newline="") as opened:
        rows = {row["variant"]: row for row in csv.DictReader(opened)}
    assert set(rows) == {"bare", "labelling", "cutting"}
    assert float(rows["bare"]["of_bare"]) == 1.0
    assert float(rows["bare"]["crops_per_s"]) > float(rows["labelling"]["crops_per_s"]) > 0


def test_compact_is_compared_crop_by_crop(photos, tmp_path):
    stores = []
    for layout in ("exact", "compact"):
        settings = LabelSettings(
            photos, "python:tiny_teachers:vague", tmp_path / layout, crops=5, topk=3, layout=layout, skip_preflight=True
        )
        stores.append(label(settings, lambda _: None))
    found = bench_compact.compare(*stores)
    assert (found["crops"], found["exact_bytes"], found["compact_bytes"]) == (128 * 5, 20, 8)
    assert 0 < found["kl_mean"] < 1e-3
    assert found["largest_sum"] <= 1 + 1e-6
    assert bench_compact.compare(stores[0], stores[0])["kl_largest"] == 0.0
    other = label(
        LabelSettings(photos, "python:tiny_teachers:vague", tmp_path / "other", crops=5, topk=3, seed=1, skip_preflight=True), print
    )
    with pytest.raises(SystemExit, match="its boxes differ"):
        bench_compact.compare(stores[0], LabelStore(other.path))
