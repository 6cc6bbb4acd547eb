"""Teacher + photographs -> store: every photo is decoded once, its crops drawn and shown to the teacher, its k best answers kept.

A store depends on the dataset, the teacher, the settings, the batch size and the machine's kind, never on when the work was broken off:
batches are formed inside one shard, counted from its first crop, and always have the same number of rows, because the last bits of a
teacher's answers depend on how many rows it sees at once.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ferkd.crops import DECODER, RESAMPLER, CropSettings, draw_crops, read_photo, take_crop
from ferkd.errors import InputError, Stopped
from ferkd.folders import Split, check_same_classes, scan_split
from ferkd.like import check_photo, images_of, same_classes
from ferkd.preflight import preflight
from ferkd.process import keep_freed_memory
from ferkd.records import BoxCodec, LabelCodec, pack_boxes, pack_labels
from ferkd.store import UNIT_IMAGES, LabelledImage, LabelStore, PathTable, StorePlan, StoreWriter
from ferkd.teacher import LoadedModel, TeacherClasses, answer_logits, choose_classes, load_teacher

log = logging.getLogger(__name__)

Layout = Literal["exact", "compact"]
CODECS: dict[Layout, tuple[BoxCodec, LabelCodec]] = {"exact": ("stored", "half"), "compact": ("replayed", "packed")}

Autocast = Literal["none", "bf16", "fp16"]
AUTOCAST_DTYPE = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}

CPU_BATCH, GPU_BATCH = 32, 256
MEASURE_SECONDS, MEASURE_SHARE = 20.0, 0.03
PREFETCH_BYTES = 512 << 20  # of crops waiting for the teacher
PLAIN_LINE_SECONDS, TERMINAL_LINE_SECONDS = 30.0, 0.5
STOP_SECONDS = 20.0  # what finishing a unit may take after SIGTERM; schedulers kill half a minute after it
FAILURES_SHOWN = 20
QUANTILE_IMAGES = 2000


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class LabelSettings:
    """What to label, with which teacher, into which store. The same settings go on with a store that was begun."""

    data: Path
    """The dataset: a folder with train/CLASS/*.jpg, and val/CLASS/*.jpg for the preflight."""
    teacher: str
    """timm:NAME, torchvision:NAME, run:DIR (a student trained by ferkd) or python:MODULE:CALLABLE."""
    out: Path
    """The store's folder: new, empty, or one that the same command began."""
    crops: int = 200
    """Crops of each photo."""
    topk: int | None = None
    """The teacher's most probable classes that are kept for each crop. Default: 5, or all of fewer."""
    layout: Layout = "exact"
    """exact: boxes and float16 probabilities as they are; compact: boxes drawn again, probabilities in a few bits."""
    input_size: int | None = None
    """Pixels of the crops shown to the teacher. Default: the teacher's own."""
    classes: Literal["teacher", "folder"] = "teacher"
    """teacher: all of the teacher's classes; folder: only those that have a folder."""
    limit: int | None = None
    """Label only so many photos, spread evenly over the sorted list."""
    dry_run: bool = False
    """Measure for 20 s, say how long it will take and how much it will store, and write nothing."""
    seed: int = 0
    """Of the draws of crops."""
    scale: tuple[float, float] = (0.08, 1.0)
    """A crop's share of the photo's area, from and to."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """A crop's width / height, from and to."""
    flip: bool = True
    """Mirror half of the crops."""
    batch_size: int | None = None
    """Crops that the teacher sees at once; part of the store's identity. Default: 32 on a CPU, 256 on a GPU."""
    teacher_weights: Path | None = None
    """Local weights: .safetensors, or a .pth that holds tensors only."""
    skip_preflight: bool = False
    """Label even if the teacher's answers look wrong."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: the GPU if there is one."""
    workers: int | None = None
    """Threads that decode and cut. Default: 1 for a teacher on the CPU, which keeps the cores busy; else one a core, at most 16."""
    autocast: Autocast = "none"
    """Run the teacher in bf16 or fp16 where PyTorch deems it safe; recorded in the store."""
    like: Path | None = None
    """Label the very crops of this store, so that ferkd merge can average the two; it decides images, crops and boxes."""

    def __post_init__(self) -> None:
        for name in ("crops", "topk", "limit", "batch_size", "input_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: {value}; give a whole number of at least 1")
        if self.workers is not None and self.workers < 0:
            raise InputError(f"workers: {self.workers}; give a whole number of at least 0")
        if self.layout not in CODECS:
            raise InputError(f"layout: {self.layout!r} is unknown; choose 'exact' or 'compact'")
        if self.autocast not in AUTOCAST_DTYPE:
            raise InputError(f"autocast: {self.autocast!r} is unknown; choose 'none', 'bf16' or 'fp16'")
        if self.like is not None:
            for field in dataclasses.fields(self):
                if field.name in ("crops", "limit", "seed", "scale", "ratio", "flip") and getattr(self, field.name) != field.default:
                    raise InputError(f"{field.name}: --like {self.like} decides it; leave it out")


def label(settings: LabelSettings, say: Callable[[str], None] = _to_stderr) -> LabelStore | None:
    """Labels settings.data/train into the store settings.out, or goes on where it was broken off; None after a dry run.

    `say` gets every line meant for people. Raises InputError for wrong settings, data or teacher, and when the teacher answers NaN;
    CheckFailed when the preflight refuses; StoreError for a store that is another's, in use or cannot be written; Stopped on SIGTERM,
    everything so far being safe. A photo that cannot be decoded is recorded as failed and named at the end, and stops nothing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("torchrun: labelling on several processes is not supported by this version; start `ferkd label` without torchrun")
    job = plan_job(settings)
    for line in job.describe():
        say(line)
    begun = any((settings.out / name).exists() for name in ("job.json", "manifest.json"))
    if settings.skip_preflight or (begun and not settings.dry_run):
        say("preflight: skipped" if settings.skip_preflight else "preflight: not repeated, since this store was begun already")
    else:
        _check_teacher(job, say)
    if settings.dry_run:
        _measure(job, say)
        return None
    # Only what cuDNN computes the same way every time may end in a store.
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=torch.backends.cudnn.allow_tf32)
    with StoreWriter(settings.out, job.plan) as writer, _stop_on_sigterm() as stop, cudnn:
        todo = writer.missing()
        if not todo:
            say(f"{settings.out}: is complete already" if writer.finished else f"{settings.out}: all shards are there")
        images = sum(last - first + 1 for _, first, last in todo)
        if images < len(job.plan.paths):
            say(f"{len(job.plan.paths) - images:,} of {len(job.plan.paths):,} photos are labelled already")
        progress = _Progress(images * job.plan.crops, job, say)
        for shard, first, last in todo:
            _write_shard(job, writer, shard, first, last, progress, stop)
        store = writer.finish()
    for line in _summary(store, progress):
        say(line)
    return store


# ---- The plan ------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """All that labelling needs, checked: which photos, which teacher on which device, and what the store will be."""

    settings: LabelSettings
    train: Split
    val: Split | None
    teacher: LoadedModel
    classes: TeacherClasses
    plan: StorePlan
    device: torch.device
    threads: int
    like: LabelStore | None = None

    def describe(self) -> Iterator[str]:
        plan = self.plan
        crops = len(plan.paths) * plan.crops
        kept = "all its classes" if self.classes.choice == "teacher" else "the folders' classes alone"
        yield (
            f"{crops:,} crops ({len(plan.paths):,} photos x {plan.crops}) for {self.teacher.spec} at "
            f"{self.teacher.preprocessing.input_size} px on {_device_name(self.device)}"
        )
        yield (
            f"{plan.image_bytes // plan.crops} bytes a crop (top {plan.k} of {plan.classes:,}: {kept}), "
            f"{_size(len(plan.paths) * plan.image_bytes)} in {self.settings.out}"
        )


def plan_job(settings: LabelSettings) -> Job:
    """Lists the photos, loads the teacher and draws up the store's plan; nothing is written. Raises InputError as label does."""
    like = None if settings.like is None else LabelStore(settings.like)
    crop_settings = like.crop_settings if like else CropSettings(settings.seed, settings.scale, settings.ratio, settings.flip)
    train = scan_split(settings.data, "train")
    val = scan_split(settings.data, "val") if (settings.data / "val").is_dir() else None
    if val is not None:
        check_same_classes(train, val)
    device = _device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    teacher = load_teacher(settings.teacher, settings.teacher_weights, settings.input_size)
    classes = choose_classes(settings.classes, train.folders, teacher)
    if like:
        classes = same_classes(like, classes, train.folders)
    topk = min(5, len(classes.names)) if settings.topk is None else settings.topk
    if topk > len(classes.names):
        raise InputError(f"topk: {topk}, but there are only {len(classes.names):,} classes; choose at most that many")
    teacher.model.to(device)

    chosen = images_of(like, train) if like else np.arange(len(train)) if settings.limit is None else _evenly(len(train), settings.limit)
    paths = train.paths if len(chosen) == len(train) else PathTable.from_paths(train.paths[int(i)] for i in chosen)
    box_codec, label_codec = CODECS[settings.layout]
    provenance = _provenance(settings, train, teacher, device)
    if like:
        box_codec = like.box_codec
        provenance |= {"decoder": {**DECODER, "apply_exif": like.exif_applied}, "like": like.manifest_sha256}
    plan = StorePlan(
        paths=paths,
        targets=classes.class_of_folder[train.folder_of[chosen]],
        crops=like.crops if like else settings.crops,
        k=topk,
        class_names=classes.names,
        folders={folder: int(i) for folder, i in zip(train.folders, classes.class_of_folder, strict=True)},
        box_codec=box_codec,
        label_codec=label_codec,
        crop_settings=crop_settings,
        batch_size=settings.batch_size or (CPU_BATCH if device.type == "cpu" else GPU_BATCH),
        temperature=1.0,
        provenance=provenance,
    )
    threads = settings.workers if settings.workers is not None else 1 if device.type == "cpu" else min(16, os.cpu_count() or 1)
    return Job(settings, train, val, teacher, classes, plan, device, threads, like)


def _provenance(settings: LabelSettings, train: Split, teacher: LoadedModel, device: torch.device) -> dict[str, Any]:
    """Where the labels come from. Nothing that varies from run to run: a resumed store must be the same to the byte."""
    tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return {
        "teacher": {
            "spec": settings.teacher,
            "weights_sha256": teacher.weights_sha256,
            "outputs": teacher.outputs,
            "classes_used": settings.classes,
            "autocast": settings.autocast,
            "tf32": tf32,
        },
        "preprocessing": teacher.preprocessing.as_dict(),
        "decoder": dict(DECODER),
        "resampler": dict(RESAMPLER),
        "device": {"type": device.type, "name": _device_name(device)},
        "software": {"python": platform.python_version(), "torch": torch.__version__, "ferkd": _version()},
        "dataset_fingerprint": train.fingerprint(),
    }


def _version() -> str:
    from ferkd import __version__

    return __version__


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device: {name!r} is none; give cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device: {name}, but PyTorch sees {torch.cuda.device_count()} GPUs; give another, or cpu")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: {name!r} is not supported; give cpu, cuda or cuda:N")
    return device


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _evenly(count: int, wanted: int) -> NDArray[np.int64]:
    """At most `wanted` of range(count), spread evenly."""
    wanted = min(wanted, count)
    return np.arange(wanted, dtype=np.int64) * count // wanted


def _check_teacher(job: Job, say: Callable[[str], None]) -> None:
    """The preflight, told to the user; raises CheckFailed when it refuses."""
    report = preflight(
        job.teacher,
        job.classes,
        job.train,
        job.val,
        job.plan.crop_settings,
        device=job.device,
        batch_size=job.plan.batch_size,
    )
    say(f"preflight: the teacher recognises {report.top1:.1%} of {report.images:,} images of {report.source}")
    say(
        f"preflight: it agrees with the folder on {report.agreement:.1%} of {report.crops:,} crops, mean confidence {report.confidence:.1%}"
    )
    for band in report.bands:
        say(
            f"  crops of {band.low:4.0%} to {band.high:4.0%} of the photo: agreement {band.agreement:6.1%}, "
            f"confidence {band.confidence:6.1%}, {band.crops} crops"
        )
    for warning in report.warnings:
        say(f"preflight: WARNING: {warning}")
    report.require()


# ---- The work ------------------------------------------------------------------------------------------------------------------


class _CutPhoto(NamedTuple):
    """A photo and all its crops: pixels uint8 [M, S, S, 3], None when it could not be read."""

    pixels: Tensor | None
    box_words: NDArray[np.uint64] | None
    width: int
    height: int
    crc: int
    failure: str | None


def _cut_photo(job: Job, image: int) -> _CutPhoto:
    """Reads and decodes photo number `image` once and cuts all of its crops."""
    path = job.plan.paths[image]
    try:
        photo, crc = read_photo(job.train.root / path, apply_exif=job.like is None or job.like.exif_applied, name=path)
        height, width = photo.shape[1:]
        if job.like is None:
            boxes, flips = draw_crops(job.plan.crop_settings, image, np.arange(job.plan.crops), width, height)
    except InputError as error:
        folder = (job.train.root / path).parent
        if not folder.is_dir():  # a disk that went away must not end as a store of failures
            raise InputError(
                f"{folder}: is no longer there; bring it back and start the same command again: what is labelled so far is kept"
            ) from error
        return _CutPhoto(None, None, 0, 0, 0, str(error).removeprefix(f"{path}: "))
    if job.like is not None:
        if not job.like.entry(image).width:
            return _CutPhoto(None, None, 0, 0, 0, job.like.manifest.failed.get(path, "has no crops in the other store"))
        check_photo(job.like, image, crc, job.train.root / path)
        boxes, flips = job.like.read(image).boxes(np.arange(job.plan.crops))
    size, interpolation = job.teacher.preprocessing.input_size, job.teacher.preprocessing.interpolation
    pixels = torch.empty(job.plan.crops, size, size, 3, dtype=torch.uint8)
    channels_first = pixels.permute(0, 3, 1, 2)
    for i, (box, flip) in enumerate(zip(boxes.tolist(), flips.tolist(), strict=True)):
        channels_first[i] = take_crop(photo, box, flip, size, interpolation)
    return _CutPhoto(pixels, pack_boxes(boxes, flips), width, height, crc, None)


def _cut_photos(job: Job, first: int, last: int) -> Iterator[tuple[int, _CutPhoto]]:
    """The photos first..last in order, decoded ahead by threads: Pillow and the resampling let go of the interpreter lock."""
    if job.threads == 0:
        yield from ((image, _cut_photo(job, image)) for image in range(first, last + 1))
        return
    size = job.teacher.preprocessing.input_size
    ahead = max(1, min(4 * job.threads, PREFETCH_BYTES // (job.plan.crops * size * size * 3)))
    waiting: collections.deque[tuple[int, Future[_CutPhoto]]] = collections.deque()
    pool = ThreadPoolExecutor(job.threads, thread_name_prefix="decode")
    try:
        for image in range(first, last + 1):
            waiting.append((image, pool.submit(_cut_photo, job, image)))
            if len(waiting) > ahead:
                number, future = waiting.popleft()
                yield number, future.result()
        while waiting:
            number, future = waiting.popleft()
            yield number, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Answering:
    """Shows batches to the teacher. On a GPU one batch is computed while the answers of the one before are fetched."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.on_gpu = job.device.type == "cuda"
        size = job.teacher.preprocessing.input_size
        # The next buffer is filled while the GPU may still read the one before.
        shape = (job.plan.batch_size, size, size, 3)
        self.buffers = [torch.empty(shape, dtype=torch.uint8, pin_memory=self.on_gpu) for _ in range(3 if self.on_gpu else 1)]
        self.shown = 0
        self.under_way: collections.deque[tuple[Tensor, Tensor, int]] = collections.deque()

    @property
    def buffer(self) -> Tensor:
        """Where the next batch's pixels go: uint8 [B, S, S, 3]."""
        return self.buffers[self.shown % len(self.buffers)]

    def show(self, rows: int) -> None:
        """Shows the buffer, of which `rows` are filled; the others repeat the last, so that the teacher always sees as many."""
        buffer = self.buffer
        buffer[rows:] = buffer[rows - 1]
        pixels = buffer.permute(0, 3, 1, 2).to(self.job.device, non_blocking=True)
        logits = answer_logits(self.job.teacher.model, self.job.teacher.preprocessing, pixels, AUTOCAST_DTYPE[self.job.settings.autocast])
        with torch.inference_mode():
            probs, ids = torch.softmax(self.job.classes.select(logits), 1).topk(self.job.plan.k, dim=1)
        self.under_way.append((ids, probs, rows))
        self.shown += 1

    def fetch(self, everything: bool) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """The answers (ids, probabilities) [rows, k] of the batches shown; all but the last unless `everything` is asked for."""
        while len(self.under_way) > (0 if everything or not self.on_gpu else 1):
            ids, probs, rows = self.under_way.popleft()
            yield ids[:rows].cpu().numpy(), probs[:rows].cpu().numpy()


def label_images(job: Job, start: int, first: int, last: int, on_crops: Callable[[int], None]) -> Iterator[LabelledImage]:
    """Labels photos first..last of the shard that begins with photo `start`, in order. `on_crops` is told how many crops are new.

    The first batch may begin with crops of photos before `first`, which are labelled already: they are shown again, since a batch holds the
    same crops in every run. A photo that cannot be read takes part as black crops, so that the batches after it do not depend on that.
    """
    crops, rows = job.plan.crops, job.plan.batch_size
    at = (first - start) * crops // rows * rows  # the shard's crop with which the batch of the first missing crop begins
    first_shown = start + at // crops
    skip = at - (first_shown - start) * crops
    answering = _Answering(job)
    cut: collections.deque[tuple[int, _CutPhoto]] = collections.deque()  # shown, at least in part, and not yet answered
    ids = np.empty((0, job.plan.k), np.int64)
    probs = np.empty((0, job.plan.k), np.float32)
    labelled_already = (first - start) * crops - at  # answers to be dropped
    filled = 0

    def answered(everything: bool) -> Iterator[LabelledImage]:
        nonlocal ids, probs, labelled_already
        for more_ids, more_probs in answering.fetch(everything):
            old = min(labelled_already, len(more_ids))
            labelled_already -= old
            ids, probs = np.concatenate([ids, more_ids[old:]]), np.concatenate([probs, more_probs[old:]])
            on_crops(len(more_ids) - old)
        while cut and len(ids) >= crops:
            image, photo = cut.popleft()
            yield _labelled(job, image, photo, ids[:crops], probs[:crops])
            ids, probs = ids[crops:], probs[crops:]

    for image, photo in _cut_photos(job, first_shown, last):
        if image >= first:
            cut.append((image, photo._replace(pixels=None)))
        done = skip if image == first_shown else 0
        while done < crops:
            take = min(rows - filled, crops - done)
            answering.buffer[filled : filled + take] = 0 if photo.pixels is None else photo.pixels[done : done + take]
            filled, done = filled + take, done + take
            if filled == rows:
                answering.show(rows)
                filled = 0
                yield from answered(everything=False)
    if filled:
        answering.show(filled)
    yield from answered(everything=True)


def _labelled(job: Job, image: int, photo: _CutPhoto, ids: NDArray[np.int64], probs: NDArray[np.float32]) -> LabelledImage:
    """Packs one photo's answers. Raises InputError when the teacher answered NaN."""
    if photo.failure is not None:
        return LabelledImage(0, 0, photo.crc, None, None, photo.failure)
    finite = np.isfinite(probs).all(axis=1)
    if not finite.all():
        raise InputError(
            f"{job.train.root / job.plan.paths[image]}: the teacher answers NaN to its crop {int(finite.argmin())} (counted from 0); "
            "are its weights broken, or does it overflow (try --autocast none)? What is labelled so far is kept"
        )
    words = pack_labels(ids, probs, job.plan.label_codec, job.plan.classes)
    boxes = photo.box_words if job.plan.box_codec == "stored" else None
    return LabelledImage(photo.width, photo.height, photo.crc, boxes, words)


def _write_shard(job: Job, writer: StoreWriter, shard: int, first: int, last: int, progress: _Progress, stop: threading.Event) -> None:
    """Labels what a shard lacks, in units that are safe as soon as they are written. Raises Stopped when asked to stop."""
    unit: list[LabelledImage] = []

    def on_crops(count: int) -> None:
        progress.add(count)
        left = (min(UNIT_IMAGES, last + 1 - written) - len(unit)) * job.plan.crops
        if stop.is_set() and left > STOP_SECONDS * progress.rate():
            raise Stopped(_stopped_text(job, progress))

    written = first
    for image in label_images(job, shard * job.plan.shard_images, first, last, on_crops):
        unit.append(image)
        if len(unit) == UNIT_IMAGES or written + len(unit) > last:
            writer.write_unit(shard, unit)
            written += len(unit)
            unit = []
            if stop.is_set() and written <= last:
                raise Stopped(_stopped_text(job, progress))
    writer.finish_shard(shard)
    if stop.is_set() and progress.done < progress.total:
        raise Stopped(_stopped_text(job, progress))


def _stopped_text(job: Job, progress: _Progress) -> str:
    return f"stopped after {progress.done:,} of {progress.total:,} crops; start the same command again to go on with {job.settings.out}"


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[threading.Event]:
    """Within the block SIGTERM only asks to stop. Elsewhere than in the main thread signals are the caller's."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- What people are told ------------------------------------------------------------------------------------------------------


class _MeasuredEnough(Exception):
    """Ends a dry run."""


class _Progress:
    """Counts crops; tells the estimate once there is one, and from time to time how far the work is."""

    def __init__(self, total: int, job: Job, say: Callable[[str], None]) -> None:
        self.total, self.job, self.say = total, job, say
        self.done = 0
        self.started = time.monotonic()
        self.first_batch: tuple[int, float] | None = None  # the first batch warms up and is left out of the rate
        self.estimated = False
        self.on_terminal = say is _to_stderr and sys.stderr.isatty()
        self.told = self.started

    def rate(self) -> float:
        """Crops a second so far."""
        now = time.monotonic()
        if self.first_batch is not None and self.done > self.first_batch[0]:
            return (self.done - self.first_batch[0]) / max(now - self.first_batch[1], 1e-9)
        return self.done / max(now - self.started, 1e-9)

    def add(self, crops: int) -> None:
        self.done += crops
        now = time.monotonic()
        if self.first_batch is None:
            self.first_batch = (self.done, now)
        if not self.estimated and self.done < self.total and self.measured(now):
            self.estimated = True
            self.say(f"measured {self.rate():,.0f} crops/s over {now - self.started:.1f} s: {self.to_come()} to come")
            self.told = now
        elif self.estimated and now - self.told >= (TERMINAL_LINE_SECONDS if self.on_terminal else PLAIN_LINE_SECONDS):
            self.told = now
            share = self.done / self.total
            line = f"{self.done:,} of {self.total:,} crops ({share:.0%}), {self.rate():,.0f} crops/s, {self.to_come()} left"
            if self.on_terminal:
                print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
            else:
                self.say(line)

    def measured(self, now: float) -> bool:
        """Whether enough is done for an estimate: 20 s or 3 % of the work, whichever comes first, and more than the first batch."""
        warm = self.first_batch is not None and self.done > self.first_batch[0]
        return now - self.started >= MEASURE_SECONDS or (warm and self.done >= MEASURE_SHARE * self.total)

    def to_come(self) -> str:
        return _duration((self.total - self.done) / max(self.rate(), 1e-9))

    def end_line(self) -> None:
        if self.on_terminal and self.estimated:
            print(file=sys.stderr)


def _measure(job: Job, say: Callable[[str], None]) -> None:
    """A dry run: labels for 20 s or 3 % of the work, throws the answers away and says what the whole would take."""
    total = len(job.plan.paths) * job.plan.crops
    progress = _Progress(total, job, lambda _: None)

    def on_crops(count: int) -> None:
        progress.add(count)
        if progress.measured(time.monotonic()):
            raise _MeasuredEnough

    last = min(len(job.plan.paths), job.plan.shard_images) - 1
    with contextlib.suppress(_MeasuredEnough):
        for _ in label_images(job, 0, 0, last, on_crops):
            pass
    rate = progress.rate()
    say(
        f"dry run: {rate:,.0f} crops/s, so {total:,} crops take {_duration(total / rate)} ({total / rate / 3600:.2f} h) "
        f"and {_size(len(job.plan.paths) * job.plan.image_bytes)}; nothing was written"
    )


def _summary(store: LabelStore, progress: _Progress) -> Iterator[str]:
    progress.end_line()
    seconds = time.monotonic() - progress.started
    manifest = store.manifest
    size = sum(shard.bytes for shard in manifest.shards) + manifest.index.bytes
    yield f"{store.path}: {manifest.images * manifest.crops:,} crops of {manifest.images:,} photos, {_size(size)}"
    if progress.done:
        yield f"labelled {progress.done:,} crops in {_duration(seconds)} ({progress.done / max(seconds, 1e-9):,.0f} crops/s)"
    quantiles = confidence_quantiles(store)
    if quantiles is not None:
        yield "confidence (largest probability): " + ", ".join(f"{share:.0%} of crops below {value:.3f}" for share, value in quantiles)
    failed = manifest.failed
    if failed:
        yield f"{len(failed):,} photos could not be read and have no labels (manifest.json lists all):"
        for path, reason in list(failed.items())[:FAILURES_SHOWN]:
            yield f"  {path}: {reason}"


def confidence_quantiles(store: LabelStore) -> list[tuple[float, float]] | None:
    """(share, confidence) at 10, 25, 50, 75 and 90 % of the crops of 2,000 photos spread over the store; None when none was labelled."""
    found = [
        store.unpack(labels.label_words)[1].max(axis=1)
        for image in _evenly(len(store), QUANTILE_IMAGES).tolist()
        if (labels := store.read(image)).width > 0
    ]
    if not found:
        return None
    shares = (0.1, 0.25, 0.5, 0.75, 0.9)
    return list(zip(shares, np.quantile(np.concatenate(found), shares).tolist(), strict=True))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
