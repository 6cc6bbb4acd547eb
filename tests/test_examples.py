"""The examples run as they stand, learn, and what they write loads where they say it does."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from photos import write_photos, write_store

from ferkd import CropLoader, RegionPolicy
from ferkd.errors import InputError
from ferkd.mixing import Mixing, draw_mixing

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("examples")
    write_photos(work / "photos")
    write_store(work / "photos", work / "labels")
    return work


def losses(work: Path, example: str, *arguments: str) -> list[float]:
    """What an example prints, run in `work`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / example), *arguments]
    ended = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [float(value) for value in re.findall(r"loss ([\d.]+)", ended.stdout)]


OURS = ("--data", "photos", "--labels", "labels", "--batch-size", "12")


def test_plain_loop(work: Path) -> None:
    import timm

    seen = losses(work, "plain_loop.py", *OURS, "--student", "resnet10t", "--size", "32", "--epochs", "8")
    assert len(seen) == 2
    assert all(0 < loss < 10 for loss in seen)
    timm.create_model("resnet10t", num_classes=3).load_state_dict(torch.load(work / "student.pth", weights_only=True))


def test_timm_loop(work: Path) -> None:
    import timm

    seen = losses(work, "timm_loop.py", *OURS, "--model", "test_vit", "--epochs", "8", "--out", "vit.pth")
    assert all(0 < loss < 10 for loss in seen)
    timm.create_model("test_vit", num_classes=3, checkpoint_path=str(work / "vit.pth"))
    seen = losses(work, "timm_loop.py", *OURS, "--model", "test_vit", "--epochs", "4", "--mix", "mixup_cutmix", "--out", "mixed.pth")
    assert all(0 < loss < 10 for loss in seen)


def test_the_loader_draws_what_ferkd_train_draws(work: Path) -> None:
    """One process's rows are those of all, whatever the number of processes."""
    options = {"size": 16, "batch_size": 24, "epochs": 4, "crops_per_image": 2, "seed": 3, "workers": 0}
    mixing = Mixing("mixup_cutmix", mix_group=3)
    alone = CropLoader(work / "photos", work / "labels", **options)
    both = [CropLoader(work / "photos", work / "labels", rank=rank, world_size=2, **options) for rank in range(2)]
    assert [alone.crops_per_image(step) for step in range(len(alone))] == [2, 2, 2, 1]
    for step, batch in enumerate(alone):
        mixed, shares = alone.draw_mixing(step, mixing), [loader.draw_mixing(step, mixing) for loader in both]
        assert mixed is not None
        assert len(mixed.lam) == len(batch.target) == 24
        assert torch.equal(mixed.lam, torch.cat([share.lam for share in shares if share is not None]))
        crops = alone.crops_per_image(step)
        expected = draw_mixing(mixing, 3, step, alone._stream.first_slot(step), 24 // crops, crops, 16)
        assert all(torch.equal(a, b) for a, b in zip(mixed, expected, strict=True))
    assert alone.draw_mixing(0, Mixing()) is None


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_accelerate_loop(work: Path) -> None:
    seen = losses(work, "accelerate_loop.py", *OURS, "--student", "resnet10t", "--size", "32", "--epochs", "4")
    assert all(0 < loss < 10 for loss in seen)
    assert (work / "student/model.safetensors").exists()


def test_fkd_script(work: Path) -> None:
    arguments = ("--softlabel_path", "labels", "-b", "12", "--epochs", "8", "-a", "resnet18", "--size", "32", "--lr", "0.01", "photos")
    seen = losses(work, "fkd_script.py", *arguments)
    assert all(0 < loss < 10 for loss in seen)


def test_language_model(work: Path) -> None:
    seen = losses(work, "language_model.py", "--vocabulary", "5000", "--steps", "40")
    assert seen[-1] < 0.7 * seen[0]


def test_the_loader_goes_on_where_it_stopped_and_shares_out(work: Path) -> None:
    policy = RegionPolicy(discard_below=0.5)

    def batches(first_step: int = 0, rank: int = 0, world_size: int = 1) -> list[torch.Tensor]:
        settings = {"first_step": first_step, "rank": rank, "world_size": world_size, "workers": 0, "policy": policy}
        loader = CropLoader(work / "photos", work / "labels", size=16, batch_size=12, epochs=4, crops_per_image=2, **settings)  # type: ignore[arg-type]
        found = [batch.pixels for batch in loader]
        assert len(found) == len(loader)
        return found

    whole = batches()
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], batches(3), strict=True))
    for both, *shares in zip(whole, batches(rank=0, world_size=2), batches(rank=1, world_size=2), strict=True):
        assert torch.equal(both, torch.cat(shares))
    with pytest.raises(InputError, match="first_step: 99 is not one of the"):
        batches(99)
    with pytest.raises(InputError, match="rank: 2 is not one of 2 processes"):
        batches(rank=2, world_size=2)


def test_the_loader_s_default_workers_are_shared_out(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for processes, workers in (("1", 8), ("4", 3), ("16", 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        loader = CropLoader(work / "photos", work / "labels", size=16, batch_size=12, epochs=4, crops_per_image=2)
        assert loader.workers == workers
