"""Kills `ferkd label` with SIGKILL at random moments, again and again, and compares what is finished with a store that was made in peace.

    python tests/kill_labelling.py --kills 20 --processes 1
    python tests/kill_labelling.py --kills 20 --processes 2        under torchrun: one process, all of them, or torchrun itself is killed

Prints a line for each kill, and exits with 1 when a finished store differs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from small_stores import files_of
from tiny_teachers import GREYS

TESTS = Path(__file__).parent
PHOTOS, CROPS = 60, 10  # photos of each of eight grey levels: shards of 192, 192 and 96


def write_photos(root: Path) -> None:
    generator = np.random.default_rng(0)
    for i, level in enumerate(GREYS):
        folder = root / f"train/g{i}"
        folder.mkdir(parents=True)
        for number in range(PHOTOS):
            pixels = np.clip(level + generator.normal(0, 30, (24, 30, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    (root / "train/g3/031.png").write_bytes(b"")


def start(data: Path, out: Path, processes: int, seconds: float) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "ferkd", "label", "--data", str(data), "--teacher", "python:tiny_teachers:slow"]
    command += ["--out", str(out), "--crops", str(CROPS), "--topk", "3", "--batch-size", "32", "--skip-preflight"]
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1", "FERKD_TEST_SECONDS": str(seconds)}
    environment["FERKD_TEST_SHARDS"] = "3"
    with open(out.with_suffix(".log"), "wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def workers(torchrun: int) -> list[int]:
    said = subprocess.run(["pgrep", "-P", str(torchrun)], capture_output=True, text=True).stdout
    return [int(pid) for pid in said.split()]


def wait_for_work(process: subprocess.Popen[bytes], out: Path, before: dict[Path, int]) -> None:
    """Until this run has written something."""
    while process.poll() is None and written(out) == before:
        time.sleep(0.005)


def written(out: Path) -> dict[Path, int]:
    sizes = {}
    for file in out.glob("shards/*"):
        with contextlib.suppress(FileNotFoundError):
            sizes[file] = file.stat().st_size
    return sizes


def kill(process: subprocess.Popen[bytes], processes: int) -> str:
    """Kills with SIGKILL; in words, who was killed."""
    victim = random.choice(["a process", "all", "torchrun"]) if processes > 1 else "the process"
    try:
        below = workers(process.pid) if processes > 1 else []
        if victim == "a process" and below:
            os.kill(random.choice(below), signal.SIGKILL)
            process.wait(60)  # torchrun ends the others
        elif victim == "torchrun":
            os.kill(process.pid, signal.SIGKILL)
        else:
            for pid in (process.pid, *below):
                os.kill(pid, signal.SIGKILL)
        process.wait(60)
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in below) and time.monotonic() < deadline:
            time.sleep(0.05)  # those whose torchrun is gone notice it within seconds
    except ProcessLookupError:
        victim += " (too late)"
    return victim


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.02, help="that the teacher takes for a batch of 32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    random.seed(options.seed)
    span = PHOTOS * 8 * CROPS / 32 * options.seconds / options.processes
    killed = finished = different = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder / "data")
        if start(folder / "data", folder / "whole", 1, 0.0).wait(120) != 0:
            raise SystemExit("the undisturbed run failed")
        wanted = files_of(folder / "whole")
        while killed < options.kills or (folder / f"store{finished}").exists():
            out = folder / f"store{finished}"
            before = written(out)
            process = start(folder / "data", out, options.processes, options.seconds)
            if killed < options.kills:
                wait_for_work(process, out, before)
                moment = random.uniform(0.0, span)
                deadline = time.monotonic() + moment
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.002)
            if killed < options.kills and process.poll() is None:
                victim = kill(process, options.processes)
                killed += 1
                left = sorted(file.suffix for file in out.glob("shards/*"))
                print(f"kill {killed:2}: {victim} after {moment:5.2f} s of work; {left.count('.bin')} shards, {left.count('.part')} begun")
            elif process.wait(300) == 0:
                same = files_of(out) == wanted
                different += not same
                finished += 1
                print(f"store {finished} finished after {killed} kills in all: {'the same to the byte' if same else 'DIFFERENT'}")
            else:
                said = out.with_suffix(".log").read_text()[-3000:]
                raise SystemExit(f"{said}\na run failed with {process.returncode} without being killed")
    print(f"{killed} kills, {finished} stores finished, {different} different")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
