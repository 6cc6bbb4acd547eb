"""The benchmark of a store's size runs, on a store that is right to the byte, and says what it claims to say."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import bench_scale, bench_store
from ferkd.store import LabelStore


@pytest.mark.parametrize("layout", ["exact", "compact"])
def test_the_store_is_whole_though_its_shards_share_their_bytes(tmp_path: Path, layout: str) -> None:
    on_disk = bench_scale.make_store(tmp_path / "store", bench_scale.Size(300, 6, 70_000, layout, 2))
    store = LabelStore(tmp_path / "store")
    store.check_integrity()
    inodes = {(store.path / shard.file).stat().st_ino for shard in store.manifest.shards}
    assert (len(store), len(store.manifest.shards), len(inodes)) == (300, 5, 3)  # two of their own, and the last, which is shorter
    assert on_disk == (64 + 64 + 44) * store.manifest.image_bytes
    for image in (0, 63, 64, 299):
        labels = store.read(image)
        assert labels.target == int(labels.path[1:9])
        ids, probs = store.unpack(labels.label_words)
        assert ids.max() < 70_000
        assert 0 < probs.sum(1).min() <= probs.sum(1).max() <= 1.01
    assert not np.array_equal(store.read(0).label_words, store.read(64).label_words)
    assert np.array_equal(store.read(0).label_words, store.read(128).label_words)


def test_pages_that_were_dropped_are_seen_to_be(tmp_path: Path) -> None:
    bench_scale.make_store(tmp_path / "store", bench_scale.Size(640, 100, 10, "exact", 10))
    for shard in (tmp_path / "store/shards").iterdir():
        shard.read_bytes()
    assert bench_scale.share_cached(tmp_path / "store") == 1.0
    bench_scale.drop_cached(tmp_path / "store")
    if bench_scale.share_cached(tmp_path / "store") == 1.0:
        pytest.skip("this file system keeps pages that it is asked to drop (tmpfs does)")
    assert bench_scale.share_cached(tmp_path / "store") < 0.1


def test_all_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "made").mkdir()
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(bench_scale, "LAYOUTS", {"exact": bench_scale.LAYOUTS["exact"]})
    monkeypatch.setattr(bench_scale, "OPENINGS", 1)
    arguments = "--images 700 --crops 10 --classes 600 --distinct 2 --seconds 0.02 --scan-images 100"
    monkeypatch.setattr(sys, "argv", ["bench_scale.py", *arguments.split(), "--folder", str(tmp_path / "made")])
    bench_scale.main()
    with open(tmp_path / "scale.csv", newline="") as file:
        imagenet, classes = csv.DictReader(file)
    assert (imagenet["images"], imagenet["crops"], classes["images"], classes["classes"]) == ("700", "10", "600", "600")
    for name in ("open_ms", "visits_a_s_1", "visits_a_s_2", "visits_a_s_dropped", "scan_max_ns_a_crop", "scan_target_ns_a_crop"):
        assert float(imagenet[name]) > 0, name
    assert 100 <= int(imagenet["scan_max_images"]) <= 700
    assert 40 < float(imagenet["index_bytes_an_image"]) < 60
    assert "on paper, 14,197,122 images x 10 crops" in capsys.readouterr().out
    assert not list((tmp_path / "made").iterdir()), "the stores are removed"


def test_a_process_that_fails_is_not_taken_for_a_figure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="opening ended with status 1"):
        bench_scale.in_processes("opening", tmp_path / "nothing")


def test_bytes_a_crop_are_those_of_the_formats(capsys: pytest.CaptureFixture[str]) -> None:
    bench_store.say_bytes(8)
    rows = {line[:30].strip(): line[30:].split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert {name: found[0] for name, found in rows.items() if name != "ml-dr"} == {
        "ferkd exact": "28", "ferkd compact": "12", "FKD float32": "57", "FKD float16": "29", "TinyViT, k=100": "404",
    }  # fmt: skip
    for name in ("ferkd exact", "ferkd compact", "FKD float32", "FKD float16"):
        record, on_disk = (float(text) for text in rows[name])
        assert record < on_disk < record + 10, name
