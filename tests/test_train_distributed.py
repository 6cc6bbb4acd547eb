"""Training under torchrun: two processes are one process on the union of their crops, resume on any number of them, and fail visibly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from photos import write_photos, write_store
from safetensors.torch import load_file

from ferkd.store import LabelStore

TESTS = Path(__file__).parent
SETTINGS = ["--epochs", "8", "--batch-size", "24", "--crops-per-image", "2", "--lr", "0.1", "--warmup-epochs", "0", "--eval-every", "4"]
SETTINGS += ["--log-every", "2", "--workers", "0", "--eval-crop-pct", "1.0", "--no-channels-last", "--min-lr", "0.01"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "data")


@pytest.fixture(scope="module")
def store(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return write_store(photos, tmp_path_factory.mktemp("labels") / "store")


def start(world: int, photos: Path, labels: LabelStore | None, out: Path, *flags: str, student: str = "plain_net") -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    command = [sys.executable, *launcher, "-m", "ferkd", "train", "--data", str(photos), "--student", f"python:photos:{student}"]
    command += ["--out", str(out), *SETTINGS, *(["--labels", str(labels.path)] if labels else []), *flags]
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def train(world: int, photos: Path, labels: LabelStore | None, out: Path, *flags: str, student: str = "plain_net") -> str:
    process = start(world, photos, labels, out, *flags, student=student)
    said = process.communicate(timeout=240)
    assert process.returncode == 0, said[1][-3000:]
    return said[1]


def lines(run: Path, kind: str) -> list[dict]:
    return [line for text in (run / "log.jsonl").read_text().splitlines() if (line := json.loads(text))["kind"] == kind]


def assert_same_run(one: Path, other: Path, *, rtol: float = 2e-4, was_stopped: bool = False) -> None:
    """The same learning: losses, evaluation and weights but for the rounding of sums in another order. The log of a run that was
    stopped averages over the steps since it went on."""
    training = ("step", "lr") if was_stopped else ("step", "loss", "train_top1", "regions", "lr")
    for kind, names in (("train", training), ("eval", ("step", "top1", "top5", "images"))):
        for a, b in zip(lines(one, kind), lines(other, kind), strict=True):
            for name in names:
                assert a[name] == pytest.approx(b[name], rel=rtol), f"{name} at step {a['step']}"
    first, second = load_file(one / "last.safetensors"), load_file(other / "last.safetensors")
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=rtol, atol=1e-5)


RULE = ["--discard-below", "0.5", "--calibrate-below", "0.7", "--temperature", "2", "--mix", "mixup_cutmix"]
RULE += ["--mix-group", "3", "--clip-grad", "1.0", "--ema-decay", "0.9"]


@pytest.mark.slow
def test_two_processes_and_two_parts_are_one_process_on_the_union(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    """FerKD with mixing, clipping and a moving average; ranks of different mass; only rank 0 writes and speaks."""
    train(1, photos, store, tmp_path / "one", *RULE)
    said = train(2, photos, store, tmp_path / "two", *RULE)
    train(1, photos, store, tmp_path / "parts", *RULE, "--accumulate", "2")
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "parts")
    assert said.count("val top-1") == len(lines(tmp_path / "two", "eval")) == 2
    assert lines(tmp_path / "two", "eval")[-1]["images"] == 12  # each once


@pytest.mark.slow
def test_two_compiled_processes_are_one_process(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    train(1, photos, store, tmp_path / "one", *RULE)
    said = train(2, photos, store, tmp_path / "two", *RULE, "--compile")
    assert "s of compiling)" in said
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_hard_labels_on_two_processes(photos: Path, tmp_path: Path) -> None:
    train(1, photos, None, tmp_path / "one")
    process = start(2, photos, None, tmp_path / "two", "--json")
    summary, said = process.communicate(timeout=240)
    assert process.returncode == 0, said[-3000:]
    assert json.loads(summary) == json.loads((tmp_path / "two" / "summary.json").read_text())  # one document: rank 0 alone speaks
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_job_stopped_on_two_processes_goes_on_with_one(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    """SIGTERM to torchrun: every process stops after the same step, and what is saved goes on anywhere."""
    train(1, photos, store, tmp_path / "whole", "--epochs", "60")
    process = start(2, photos, store, tmp_path / "broken", "--epochs", "60")
    deadline = time.time() + 120
    while process.poll() is None and not (tmp_path / "broken" / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert "everything is saved" in said
    state = torch.load(tmp_path / "broken" / "checkpoint.pt", weights_only=True)["state"]
    assert 0 < state["step"] < 60
    assert len(state["random"]) == 2
    train(1, photos, store, tmp_path / "broken", "--epochs", "60", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "broken", rtol=2e-3, was_stopped=True)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    process = start(2, photos, store, tmp_path / "run", "--epochs", "4000")
    deadline = time.time() + 120
    while process.poll() is None and not (tmp_path / "run" / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert "SIGKILL" in said or "-9" in said
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_what_cannot_be_shared_out_is_refused_in_words(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    process = start(1, photos, store, tmp_path / "run", "--accumulate", "5")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert (
        "batch_size: 12 images a step, shared out over 1 process(es) in 5 part(s) each, are not even; choose a multiple of 10 crops" in said
    )
    process = start(1, photos, store, tmp_path / "run", "--accumulate", "2", "--mix", "mixup", "--mix-group", "4")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert "mix_group: 4 images find their partners among each other, but 12 images a step" in said
