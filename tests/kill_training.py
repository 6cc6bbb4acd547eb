"""Kills `ferkd train` with SIGKILL at random moments, again and again, and compares what is finished with a run that was left in peace.

    python tests/kill_training.py --kills 20

After every kill the run's folder is looked at, then the same command goes on with --resume. Some kills come while the program starts, most
while it works; the process is killed alone, with its loader processes, or one loader process is killed. Prints a line for each kill, and
exits with 1 when a folder is damaged or a finished run differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from photos import dropping_net, write_photos, write_store
from safetensors.torch import load_file
from torch import Tensor, nn

from ferkd.runs import sealed_step

TESTS = Path(__file__).parent
SETTINGS = "--epochs 40 --batch-size 12 --crops-per-image 4 --warmup-epochs 2 --eval-every 2 --log-every 3 --eval-crop-pct 1.0 --workers 2 "
SETTINGS += "--lr 0.1 --ema-decay 0.9 --mix mixup_cutmix --mix-group 3 --discard-below 0.5 --calibrate-below 0.7 --no-channels-last"
STEPS = 80


class SlowNet(nn.Sequential):
    """Takes FERKD_TEST_SECONDS for a batch."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(float(os.environ.get("FERKD_TEST_SECONDS", "0")))
        answered: Tensor = super().forward(x)
        return answered


def slow_net(num_classes: int) -> tuple[nn.Module, dict[str, object]]:
    """With BatchNorm and dropout, so that statistics and random state must survive too."""
    net, described = dropping_net(num_classes)
    assert isinstance(net, nn.Sequential)
    return SlowNet(*net), described


def start(folder: Path, out: Path, seconds: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ferkd", "train", "--data", str(folder / "data"), "--labels", str(folder / "labels")]
    command += ["--student", "python:kill_training:slow_net", "--out", str(out), *SETTINGS.split(), "--resume"]
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1", "FERKD_TEST_SECONDS": str(seconds)}
    with open(out.with_suffix(".log"), "wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log; a last one that was being written is none."""
    log = run / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def kill(process: subprocess.Popen[bytes], moment: float) -> str:
    """Kills with SIGKILL after `moment` seconds; in words, who was killed."""
    deadline = time.monotonic() + moment
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    loaders = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    victim = random.choice(["the process", "all", "a loader"] if loaders else ["the process"])
    try:
        if victim == "a loader":
            os.kill(int(random.choice(loaders)), signal.SIGKILL)
        elif victim == "all":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except ProcessLookupError:
        victim += " (too late)"
    process.wait(60)
    return victim


def damages(run: Path) -> list[str]:
    """What is wrong with the folder of a run that was killed: every file in it that has a name of its own is whole."""
    found = []
    for name in ("config.json", "summary.json"):
        if (run / name).exists():
            json.loads((run / name).read_bytes())
    for name in ("last.safetensors", "best.safetensors"):
        if (run / name).exists():
            load_file(run / name)
    checkpoints = [path for name in ("checkpoint.pt", "checkpoint-previous.pt") if (path := run / name).exists()]
    steps = []
    for path in checkpoints:
        try:
            steps.append(sealed_step(path))
        except ValueError as error:
            found.append(f"{path.name}: {error}")
    read_log(run)
    if (run / "last.safetensors").exists() and not steps:
        found.append("weights without a checkpoint")
    return found


def differences(run: Path, whole: Path) -> list[str]:
    """What of a finished run is not as in the one that was left in peace. Times may differ, and the means in lines during which it was
    broken off."""
    found = []
    names = [sorted(path.name for path in folder.iterdir()) for folder in (run, whole)]
    if set(names[0]) - {"checkpoint-previous.pt"} != set(names[1]) - {"checkpoint-previous.pt"}:
        found.append(f"files: {names[0]}")
    for name in ("last.safetensors", "best.safetensors"):
        if (run / name).read_bytes() != (whole / name).read_bytes():
            found.append(name)
    states = [torch.load(folder / "checkpoint.pt", weights_only=True)["state"] for folder in (run, whole)]
    for state in states:
        state.pop("seconds")
    if not same(*states):
        found.append("checkpoint.pt")
    lines = [read_log(folder) for folder in (run, whole)]
    for name in ("kind", "step", "epoch", "crops", "lr", "top1", "top5", "images", "best_top1"):
        if [line.get(name) for line in lines[0]] != [line.get(name) for line in lines[1]]:
            found.append(f"log.jsonl: {name}")
    if (run / "log.jsonl").read_bytes().count(b"\n") != len(lines[1]) or not (run / "log.jsonl").read_bytes().endswith(b"\n"):
        found.append("log.jsonl: lines")
    return found


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, in nested dictionaries, lists and tensors."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.05, help="that the student takes for a batch")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    random.seed(options.seed)
    killed = finished = faults = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder / "data")
        write_store(folder / "data", folder / "labels")
        began = time.monotonic()
        undisturbed = start(folder, folder / "whole", 0.0)
        while undisturbed.poll() is None and not read_log(folder / "whole"):
            time.sleep(0.01)
        starting = time.monotonic() - began
        if undisturbed.wait(300) != 0:
            raise SystemExit(f"{(folder / 'whole.log').read_text()}\nthe undisturbed run failed")
        while killed < options.kills or (folder / f"run{finished}").exists():
            out = folder / f"run{finished}"
            before = len(read_log(out))
            process = start(folder, out, options.seconds)
            if killed < options.kills:
                if random.random() < 0.8:
                    while process.poll() is None and len(read_log(out)) <= before:
                        time.sleep(0.002)
                    moment, when = random.uniform(0.0, STEPS * options.seconds / 2), "of work"
                else:
                    moment, when = random.uniform(0.0, starting), "of starting"
                if process.poll() is None:
                    victim = kill(process, moment)
                    killed += 1
                    wrong = damages(out) if out.exists() else []
                    if victim == "a loader" and process.returncode not in (0, 2):
                        wrong.append(f"exit status {process.returncode}")
                    faults += len(wrong)
                    step = max((line["step"] for line in read_log(out)), default=0)
                    where = f"{victim} after {moment:5.2f} s {when}, at step {step:2} or later"
                    print(f"kill {killed:2}: {where}; {'; '.join(wrong) or 'nothing damaged'}", flush=True)
                    continue
            if process.wait(300) != 0:
                said = out.with_suffix(".log").read_text()[-3000:]
                raise SystemExit(f"{said}\na run failed with {process.returncode} without being killed")
            wrong = differences(out, folder / "whole")
            faults += len(wrong)
            finished += 1
            verdict = f"DIFFERENT: {'; '.join(wrong)}" if wrong else "the same to the bit"
            print(f"run {finished} finished after {killed} kills in all: {verdict}", flush=True)
    print(f"{killed} kills, {finished} runs finished, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
