"""Runs the studies: prepares images and labels, trains every arm from every seed through `ferkd train`, and appends a row a finished run.

    python -m bench.convergence.run --work DIR [STUDY ...] [--jobs 2]       all studies, or those named; skips what the CSVs have
    python -m bench.convergence.run --work DIR --list                       what is done and what is left

May be stopped at any moment (SIGTERM and Ctrl-C save what runs; exit status 75) and started again with the same command. DIR keeps
images, labels and runs and may be deleted: it is made again. The rows are in bench/results/convergence-STUDY.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ferkd
from bench import machine
from bench.convergence.datasets import Images, prepare
from bench.convergence.results import CURVE_COLUMNS, RUN_COLUMNS, append_rows, curves_file, read_rows, runs_file
from bench.convergence.settings import EXTENSION, TEACHERS, Arm, Study
from bench.convergence.stores import Labelling, Labels, derive
from bench.convergence.studies import ALL_STUDIES, STUDIES, NotTuned
from ferkd.store import LabelStore

REPOSITORY = Path(__file__).resolve().parents[2]
Need = Images | Labelling | Labels


class Failed(Exception):
    """A command of ferkd that did not end well: which, and its last line."""


class Stopping(Exception):
    """Asked to stop; `seconds` of processor time were spent on what was stopped."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds


class Place(NamedTuple):
    """Where things are and how they are run."""

    work: Path
    data: Path
    results: Path
    jobs: int = 2
    threads: int = 1
    workers: int = 0
    """Loader processes of each run, and of labelling: they change no result."""
    label_batch: int | None = None
    """Crops a batch when labelling, instead of the teacher's own."""

    def store(self, labels: Labelling | Labels) -> Path:
        return self.work / "labels" / labels.name

    def run(self, study: Study, arm: Arm, seed: int) -> Path:
        return self.work / "runs" / study.name / f"{arm.config}-seed{seed}"


# ---- Commands as child processes -------------------------------------------------------------------------------------------------


class Children:
    """The commands that are running, so that all can be told to stop. They are told so by the kernel if this process is killed."""

    def __init__(self, threads: int) -> None:
        self.stopping = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()
        paths = [str(REPOSITORY), str(REPOSITORY / "tests"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        # glibc would return every step's activations to the system and fault them in again: a tenth of the time.
        keep_memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
        self._environment = {**keep_memory, **os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}

    def stop(self) -> None:
        self.stopping.set()
        with self._guard:
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)  # Popen.send_signal might take the status that wait4 is waiting for

    def ferkd(self, arguments: Sequence[str], log: Path, also_open: Sequence[int] = ()) -> float:
        """`python -m ferkd ARGUMENTS`, its output appended to `log`; the processor seconds it took.

        Raises Failed, and Stopping when it was told to stop.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            with self._guard:
                if self.stopping.is_set():
                    raise Stopping
                process = subprocess.Popen(
                    [sys.executable, "-m", "ferkd", *arguments], env=self._environment, cwd=log.parent, stdin=subprocess.DEVNULL,
                    stdout=output, stderr=output, pass_fds=also_open, preexec_fn=_die_with_parent,
                )  # fmt: skip
                self._running.add(process)
            try:
                _, status, usage = os.wait4(process.pid, 0)
            finally:
                with self._guard:
                    self._running.discard(process)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = usage.ru_utime + usage.ru_stime
        if process.returncode != 0:
            if self.stopping.is_set():
                raise Stopping(seconds)
            lines = log.read_text(errors="replace").strip().splitlines() or [""]
            raise Failed(f"ferkd {arguments[0]} ended with status {process.returncode}: {lines[-1]} (all of it: {log})")
        return seconds


_LIBC = ctypes.CDLL(None)


def _die_with_parent() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


# ---- What a run needs ------------------------------------------------------------------------------------------------------------


def needs(arm: Arm) -> list[Need]:
    """What must be there before an arm can run, in the order of making."""
    labels = [] if arm.labels is None else [arm.labels.labelling.images, arm.labels.labelling, arm.labels]
    return [Images(arm.images.source), arm.images, *labels]


def is_there(need: Need, place: Place) -> bool:
    if isinstance(need, Images):
        return (place.work / "data" / need.name).exists()
    return (place.store(need) / "manifest.json").exists()


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Holds FOLDER.lock; its descriptor is to be handed to a child: should this process be killed, the next waits for the child to save."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def make(need: Need, place: Place, children: Children) -> None:
    """Images, labels of a teacher, or labels derived from those; goes on with what was begun."""
    if isinstance(need, Images):
        prepare(need, place.work, place.data)
        return
    data, store = place.work / "data" / need.images.name, place.store(need)
    with locked(store) as lock:
        if isinstance(need, Labels):
            derive(need, LabelStore(place.store(need.labelling)), data, store)
            return
        teacher = TEACHERS[need.teacher]
        weights = ["--teacher-weights", str(place.data / teacher.weights)] if teacher.weights else []
        more = ["--workers", str(place.workers * place.jobs)] if place.workers else []
        more += ["--batch-size", str(place.label_batch)] if place.label_batch else []
        children.ferkd(
            ["label", "--data", str(data), "--teacher", teacher.spec, *weights, "--out", str(store), "--crops", str(need.crops),
             "--topk", str(need.topk), "--scale", str(need.min_scale), "1.0", *teacher.flags, *need.flags, *more],
            place.work / "logs" / f"label-{need.name}.txt", [lock],
        )  # fmt: skip


# ---- One run ---------------------------------------------------------------------------------------------------------------------


def train_arguments(study: Study, arm: Arm, seed: int, place: Place, usable_images: int) -> list[str]:
    """The command line of a run. ferkd counts epochs of usable images, which depend on the policy; a budget is steps."""
    recipe = arm.recipe
    epoch = recipe.batch_size / usable_images  # of one step
    labels = ["--labels", str(place.store(arm.labels))] if arm.labels else ["--min-scale", str(arm.min_scale)]
    every = 2.0 * recipe.steps if recipe.evaluations == 1 else recipe.steps / recipe.evaluations
    settings: dict[str, Any] = {
        "student": recipe.student, "data": place.work / "data" / arm.images.name, "out": place.run(study, arm, seed), "seed": seed,
        "epochs": recipe.steps * epoch, "warmup-epochs": recipe.warmup_share * recipe.steps * epoch,
        "single-crop-epochs": recipe.single_crop_share * recipe.steps * epoch, "eval-every": every * epoch, "min-lr": 0.0,
        "batch-size": recipe.batch_size, "crops-per-image": recipe.crops_per_image, "image-size": recipe.image_size, "eval-crop-pct": 1.0,
        "optimizer": "sgd", "momentum": 0.9, "lr": recipe.lr, "weight-decay": recipe.weight_decay, "amp": recipe.amp,
        "workers": place.workers, "cache": "none" if place.workers else "decoded", "log-every": 100,
    }  # fmt: skip
    if arm.method.online and (weights := TEACHERS[arm.method.online].weights):
        settings["teacher-weights"] = place.data / weights
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return ["train", *flags, *labels, *arm.method.flags(), "--no-decay-norms-and-biases", "--resume", "auto", "--json"]


def usable_images(arm: Arm, place: Place) -> int:
    if arm.labels is None:
        return sum(1 for _ in (place.work / "data" / arm.images.name / "train").glob("*/*"))
    return int(LabelStore(place.store(arm.labels)).scan(arm.method.policy).usable.sum())


def train_one(study: Study, arm: Arm, seed: int, place: Place, children: Children) -> dict[str, Any]:
    """Trains, or goes on with what was begun, and returns the run's row."""
    folder = place.run(study, arm, seed)
    attempts = folder.with_suffix(".attempts")
    with locked(folder) as lock:
        if not (folder / "summary.json").exists():
            with open(attempts, "a") as file:
                print(json.dumps({"begun": time.time()}), file=file)
            before = time.perf_counter()
            arguments = train_arguments(study, arm, seed, place, usable_images(arm, place))
            stopped: Stopping | None = None
            try:
                seconds = children.ferkd(arguments, folder.with_suffix(".txt"), [lock])
            except Stopping as error:
                stopped, seconds = error, error.seconds
            with open(attempts, "a") as file:
                print(json.dumps({"cpu": seconds, "wall": time.perf_counter() - before, "facts": facts(place)}), file=file)
            if stopped:
                raise stopped
        summary = json.loads((folder / "summary.json").read_text())
    if summary["steps"] != arm.recipe.steps:
        raise Failed(f"{folder}: took {summary['steps']} steps, not the budget's {arm.recipe.steps}")
    return row(study, arm, seed, place, summary, [json.loads(line) for line in attempts.read_text().splitlines()])


def row(study: Study, arm: Arm, seed: int, place: Place, summary: dict[str, Any], attempts: list[dict[str, Any]]) -> dict[str, Any]:
    labels, policy, recipe, regions = arm.labels, arm.method.policy, arm.recipe, summary["stored_regions"] or {}
    begun, ended = ([a for a in attempts if key in a] for key in ("begun", "cpu"))
    known = len(begun) == len(ended) > 0
    return {
        "study": study.name, "config": arm.config, "seed": seed, "source": arm.images.source, "wrong": arm.images.wrong,
        "share": arm.images.share, "held_out": int(arm.images.held_out), "min_scale": arm.min_scale,
        "teacher": labels.labelling.teacher if labels else arm.method.online, "stored_crops": labels.crops if labels else "",
        "k": labels.k if labels else "", "codec": labels.codec if labels else "", "method": arm.method.name, "varied": arm.varied,
        "discard_below": policy.discard_below, "calibrate_below": policy.calibrate_below, "discard_above": policy.discard_above,
        "confidence": policy.confidence, "smoothing": policy.smoothing, "student": recipe.student.rpartition(":")[2], "lr": recipe.lr,
        "crops_per_image": recipe.crops_per_image, "steps": summary["steps"], "crops": summary["crops"],
        "top1_last": f"{summary['top1']:.6f}", "top1_best": f"{summary['best_top1']:.6f}", "top5_last": f"{summary['top5']:.6f}",
        "top1_folders_last": f"{summary['top1_folders']:.6f}", "val_images": summary["val_images"],
        "usable_images": summary["usable_images"], **{name: regions.get(name, "") for name in ("discarded", "calibrated", "kept")},
        "wall_seconds": f"{sum(a['wall'] for a in ended):.1f}" if known else "", "train_seconds": summary["seconds"],
        "cpu_seconds": f"{sum(a['cpu'] for a in ended):.1f}" if known else "", "attempts": len(begun),
        **((ended[-1].get("facts") if ended else None) or facts(place)),
    }  # fmt: skip


def facts(place: Place) -> dict[str, Any]:
    """What a run was made with, and when."""
    return {
        "threads": place.threads, "jobs": place.jobs, "machine": machine.processor(), "cores": os.cpu_count(),
        "python": platform.python_version(), "torch": torch.__version__, "ferkd": ferkd.__version__, "commit": commit(),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def curve(study: Study, arm: Arm, seed: int, place: Place) -> list[dict[str, Any]]:
    """A run's evaluations, from its log."""
    lines = (json.loads(line) for line in (place.run(study, arm, seed) / "log.jsonl").read_text().splitlines())
    return [
        {"study": study.name, "config": arm.config, "seed": seed, **{name: line[name] for name in ("step", "crops", "seconds", "top1")}}
        for line in lines
        if line["kind"] == "eval"
    ]


def commit() -> str:
    """The commit of the code that runs, with a + when ferkd or kernels differ from it; "" outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", "ferkd", "kernels", "csrc") else "")


# ---- The queue -------------------------------------------------------------------------------------------------------------------


Run = tuple[Study, Arm, int]
Made = Callable[[Path], Study]


def made(makers: Iterable[Made], results: Path) -> list[Study]:
    """The studies that can be made from the rows there are."""
    studies = []
    for maker in makers:
        with contextlib.suppress(NotTuned):
            studies.append(maker(results))
    return studies


class Queue:
    """Hands out to threads the first run that is left, looking each time: a row may complete the tuning that a study waits for.

    A run whose needs another thread is making lets a later one go first.
    """

    def __init__(self, makers: Sequence[Made], place: Place, children: Children) -> None:
        self.makers, self.place, self.children = makers, place, children
        self.failures: dict[tuple[str, str, int], str] = {}
        self._running: set[tuple[str, str, int]] = set()
        self._being_made: set[Need] = set()
        self._changed = threading.Condition()

    def left(self) -> list[Run]:
        """The runs that are neither done nor running nor failed, in order."""
        runs = []
        for study in made(self.makers, self.place.results):
            done = {(row["config"], row["seed"]) for row in read_rows(runs_file(self.place.results, study.name))}
            others = self._running | self.failures.keys()
            runs += [
                (study, arm, seed)
                for arm, seed in study.runs()
                if (arm.config, str(seed)) not in done and (study.name, arm.config, seed) not in others
            ]
        return sorted(runs, key=lambda run: run[2] in EXTENSION)  # every study's planned seeds before any study's further ones

    def work(self) -> None:
        """What each thread does until nothing is left, or all are asked to stop."""
        while (claim := self._claim()) is not None:
            (study, arm, seed), missing = claim
            key = (study.name, arm.config, seed)
            name = f"{study.name}: {arm.method.name}, {arm.images.name}, {arm.varied or arm.config}, seed {seed}"
            try:
                for need in missing:
                    say(f"making {need.name}")
                    make(need, self.place, self.children)
                    self._ended(needs={need})
                result = train_one(study, arm, seed, self.place, self.children)
                if arm.recipe.evaluations > 1:
                    append_rows(curves_file(self.place.results, study.name), CURVE_COLUMNS, curve(study, arm, seed, self.place))
                append_rows(runs_file(self.place.results, study.name), RUN_COLUMNS, [result])
                say(f"{name}: top-1 {float(result['top1_last']):.2%}, {result['cpu_seconds']} CPU seconds")
            except Stopping:
                return
            except Exception as error:  # one broken arm must not stop the night's other runs
                self.failures[key] = f"{name}: {type(error).__name__}: {error}"
                say(f"FAILED {self.failures[key]}")
            finally:
                self._ended(needs=set(missing), run=key)

    def _claim(self) -> tuple[Run, list[Need]] | None:
        with self._changed:
            while not self.children.stopping.is_set():
                left = self.left()
                for study, arm, seed in left:
                    missing = [need for need in dict.fromkeys(needs(arm)) if not is_there(need, self.place)]
                    if not self._being_made & set(missing):
                        self._being_made |= set(missing)
                        self._running.add((study.name, arm.config, seed))
                        return (study, arm, seed), missing
                if not left and not self._running:
                    break
                self._changed.wait(timeout=5.0)
            return None

    def _ended(self, needs: set[Need], run: tuple[str, str, int] | None = None) -> None:
        with self._changed:
            self._being_made -= needs
            self._running -= {run} if run else set()
            self._changed.notify_all()


def say(line: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {line}", flush=True)


def run_studies(makers: Sequence[Made], place: Place, install_signals: Callable[[Callable[[], None]], None] = lambda stop: None) -> int:
    """Runs what the CSVs lack, in the order of the studies; also what can be made only when tuning is complete.

    Returns the exit status: 0 all done, 1 some failed, 75 stopped, 2 not begun. `install_signals` is given what stops it.
    """
    children = Children(place.threads)
    install_signals(children.stop)
    place.work.mkdir(parents=True, exist_ok=True)
    with open(place.work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{place.work}: another runner is at work here; give another --work or stop that one", file=sys.stderr)
            return 2
        queue = Queue(makers, place, children)
        say(f"{len(queue.left())} runs to do, {place.jobs} at a time, {place.threads} thread(s) each")
        threads = [threading.Thread(target=queue.work) for _ in range(place.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for failure in queue.failures.values():
        print(failure, file=sys.stderr)
    return 75 if children.stopping.is_set() else 1 if queue.failures else 0


def listing(makers: Mapping[str, Made], results: Path) -> str:
    lines = []
    for name, maker in makers.items():
        try:
            runs = [(arm.config, str(seed)) for arm, seed in maker(results).runs()]
        except NotTuned as why:
            lines.append(f"{name:<20} {why}")
            continue
        rows = read_rows(runs_file(results, name))
        there = sum(run in {(row["config"], row["seed"]) for row in rows} for run in runs)
        cpu = [float(row["cpu_seconds"]) for row in rows if row["cpu_seconds"]]
        mean = f", {sum(cpu) / len(cpu):.1f} CPU seconds a run" if cpu else ""
        lines.append(f"{name:<20} {there:>4} of {len(runs):>4} runs done{mean}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(ALL_STUDIES)}; default: {', '.join(STUDIES)}")
    parser.add_argument("--work", type=Path, required=True, help="folder for images, labels and runs, outside the repository")
    parser.add_argument("--data", type=Path, default=os.environ.get("FERKD_TEST_DATA"), help="the test data; default: FERKD_TEST_DATA")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "bench" / "results", help="folder of the CSVs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of each run")
    parser.add_argument("--label-batch", type=int, help="crops a batch when labelling, instead of the teacher's own")
    parser.add_argument("--seconds", type=float, help="stop, as when asked to, after this long")
    parser.add_argument(
        "--nice", type=int, default=19, help="these take hours: whatever else the machine is used for goes first (0: nothing does)"
    )
    parser.add_argument("--list", action="store_true", help="say what is done and what is left")
    options = parser.parse_args()
    if unknown := [name for name in options.studies if name not in ALL_STUDIES]:
        parser.error(f"{', '.join(unknown)}: no such study; choose from {', '.join(ALL_STUDIES)}")
    if options.data is None or not options.data.is_dir():
        parser.error(f"--data: {options.data} is no folder; give the test data's")
    if min(options.jobs, options.threads) < 1:
        parser.error("--jobs and --threads: give at least 1")
    makers = {name: ALL_STUDIES[name] for name in options.studies or STUDIES}
    if options.list:
        print(listing(makers, options.results))
        return 0
    os.nice(options.nice)

    def install(stop: Callable[[], None]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop())
        if options.seconds is not None:
            timer = threading.Timer(options.seconds, stop)
            timer.daemon = True
            timer.start()

    place = Place(
        options.work.resolve(), options.data.resolve(), options.results.resolve(), options.jobs, options.threads, options.workers,
        options.label_batch,
    )  # fmt: skip
    return run_studies(list(makers.values()), place, install)


if __name__ == "__main__":
    sys.exit(main())
