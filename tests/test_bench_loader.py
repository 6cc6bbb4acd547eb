"""The loader benchmark's own machinery: what it compares serves the same crops, and it runs. No time decides."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

pytest.importorskip("torchvision")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import bench_loader

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eighteen soft pictures in two classes."""
    random = np.random.default_rng(0)
    for number in range(18):
        folder = tmp_path / f"photos/train/class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (60 + number, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2)).save(folder / f"{number}.jpg", quality=95)
    return tmp_path / "photos"


def test_all_loaders_serve_the_same_visits(photos: Path, tmp_path: Path) -> None:
    loaders = bench_loader.make_loaders(photos, tmp_path / "store")
    ours, cached, fkd = next(loaders.ours()), next(loaders.ours(cached=True)), next(loaders.fkd())
    assert torch.equal(ours.pixels, cached.pixels)
    assert torch.equal(ours.target, fkd[1])
    mean, std = (torch.tensor(value)[:, None, None] for value in (bench_loader.MEAN, bench_loader.STD))
    gap = (ours.pixels - (fkd[0] * std + mean) * 255).abs()
    assert gap.shape == (64, 3, 224, 224)
    assert gap.max() < 2.5
    assert gap.mean() < 0.1
    assert next(loaders.decoding()) > 0


def test_the_benchmark_runs_small(photos: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/bench_loader.py"), "--data", str(photos), "--seconds", "0", "--photos", "2", "--steps", "0"],
        env={**os.environ, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "loader.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["part"] for row in rows} == {"loader", "decoder", "resampler"}
    by_name = {row["variant"]: row for row in rows}
    assert by_name["ferkd.crops.decode (Pillow, EXIF)"]["largest"] == "0"
    assert int(by_name["ferkd.crops.take_crop"]["largest"]) <= 2
    assert by_name["FKD's way"]["x_fkd"] == by_name["decoding alone"]["of_decoding"] == "1.00"
    assert all(float(row["ms_a_photo"]) > 0 for row in rows)


def test_memory_is_watched() -> None:
    said: list[str] = []
    found = bench_loader.memory(4, 1, said.append)
    assert len(found) == len(said) == 4
    assert min(found) > 10
    assert all("loaders" in line for line in said)
