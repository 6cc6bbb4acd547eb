"""Weights trained here are timm's: timm.create_model(..., checkpoint_path=...) loads them, and answers as `ferkd eval` does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import COLOURS, write_photos, write_store
from safetensors import safe_open

from ferkd.cli import main
from ferkd.data import CenterViews
from ferkd.evaluation import evaluate_model
from ferkd.preprocessing import Preprocessing
from ferkd.sources import scan_split
from ferkd.teacher import load_run

TESTS = Path(__file__).parent
TRAIN = "--student test_resnet --image-size 32 --epochs 4 --batch-size 24 --crops-per-image 2 --lr 0.02 --workers 0 --warmup-epochs 0 "
TRAIN += "--eval-every 2"

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("timm")
    write_photos(work / "photos")
    write_store(work / "photos", work / "labels")
    return work


def train(work: Path, out: str, *flags: str, processes: int = 1) -> Path:
    arguments = [
        "train",
        "--data",
        str(work / "photos"),
        "--labels",
        str(work / "labels"),
        "--out",
        str(work / out),
        *TRAIN.split(),
        *flags,
    ]
    if processes == 1:
        main(arguments)
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "ferkd"]
        environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([*launcher, *arguments], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return work / out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "processes"),
    [((), 1), (("--ema-decay", "0.9"), 1), (("--compile",), 1), ((), 2)],
    ids=["plain", "average", "compiled", "two processes"],
)
def test_timm_loads_what_was_trained_and_answers_the_same(work: Path, flags: tuple[str, ...], processes: int) -> None:
    run = train(work, f"run-{processes}{'-'.join(flags)}", *flags, processes=processes)
    summary = json.loads((run / "summary.json").read_text())
    for which in ("last", "best"):
        file = run / f"{which}.safetensors"
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert metadata["architecture"] == "timm:test_resnet"
        classes = json.loads(metadata["classes"])
        assert classes == list(COLOURS)
        preprocessing = Preprocessing.from_dict(json.loads(metadata["preprocessing"]))
        model = timm.create_model("test_resnet", num_classes=len(classes), checkpoint_path=str(file)).eval()

        ours = load_run(file)
        val = scan_split(work / "photos", "val")
        views = CenterViews(val, np.arange(3), preprocessing.input_size, preprocessing.crop_pct, preprocessing.interpolation)
        pixels, targets = torch.stack([views[i][0] for i in range(len(views))]), torch.tensor([views[i][1] for i in range(len(views))])
        with torch.inference_mode():
            logits = model(preprocessing.normalise(pixels))
            assert torch.equal(logits, ours.model.eval()(preprocessing.normalise(pixels)))
        evaluated = evaluate_model(ours, work / "photos", batch_size=len(views), workers=0)
        assert evaluated.top1 == (logits.argmax(1) == targets).double().mean().item()
        assert evaluated.top1 == summary["top1" if which == "last" else "best_top1"]


def test_the_average_is_what_is_saved(work: Path) -> None:
    """Not the last step's weights."""
    run = train(work, "averaged", "--ema-decay", "0.9")
    state = torch.load(run / "checkpoint.pt", weights_only=True)["state"]
    saved = load_run(run / "last.safetensors").model.state_dict()
    weights = [name for name, value in saved.items() if value.is_floating_point() and "running" not in name]
    assert all(torch.equal(saved[name], state["ema"][name]) for name in weights)
    assert not all(torch.equal(saved[name], state["model"][name]) for name in weights)


def test_equal_weights_are_equal_files(work: Path) -> None:
    """The metadata too: safetensors writes it in another order every time, unless it is ordered."""
    files = [train(work, out) / "last.safetensors" for out in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
