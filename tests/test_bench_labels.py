"""The benchmarks of labelling and of `compact` run, and say what they claim to say."""

import csv
import dataclasses
import functools
import sys

import numpy as np
import pytest
from photos import write_photos, write_store
from PIL import Image
from tiny_teachers import GREYS

from bench import bench_compact, bench_labeling
from ferkd.labeling import LabelSettings, label
from ferkd.recipes import small_images
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


def test_students_are_trained_on_either_layout_and_the_difference_is_told(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("scipy")
    monkeypatch.delenv("FERKD_TEST_DATA", raising=False)
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(bench_compact, "prepare_trial", functools.partial(small_trial, tmp_path))
    monkeypatch.setattr(sys, "argv", ["bench_compact.py", "--train", "2", "--work", str(tmp_path / "work")])
    bench_compact.main()
    said = capsys.readouterr().out
    assert "compact - exact: " in said
    assert "95 % interval" in said
    with open(tmp_path / "compact-train.csv", newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [(row["seed"], row["layout"]) for row in rows] == [("0", "exact"), ("0", "compact"), ("1", "exact"), ("1", "compact")]
    assert LabelStore(tmp_path / "labels/compact").label_codec == "packed"
    monkeypatch.setattr(bench_compact, "train", None)  # what is finished is not trained again
    bench_compact.main()


def small_trial(folder, work, epochs, photos):
    data = write_photos(folder / "photos") if not (folder / "photos").exists() else folder / "photos"
    stores = {layout: folder / "labels" / layout for layout in bench_compact.LAYOUTS}
    for layout, store in stores.items():
        if not store.exists():
            write_store(data, store, compact=layout == "compact")
    config = dataclasses.replace(small_images(), epochs=2, batch_size=8, image_size=16, workers=0)
    return bench_compact.Trial(data, stores, "python:photos:tiny_net", config)


@pytest.mark.parametrize(
    ("exact", "compact", "said"),
    [
        ([0.900, 0.910, 0.905], [0.901, 0.910, 0.904], "equal within 0.5 points"),
        ([0.90, 0.93, 0.88], [0.91, 0.91, 0.90], "is not excluded: train more seeds"),
        ([0.90, 0.91, 0.92], [0.85, 0.861, 0.869], "they differ"),
    ],
)
def test_what_follows_from_the_difference(exact, compact, said):
    pytest.importorskip("scipy")
    rows = [
        {"seed": seed, "layout": layout, "top1": value}
        for layout, values in (("exact", exact), ("compact", compact))
        for seed, value in enumerate(values)
    ]
    assert said in bench_compact.verdict(rows)[-1]
