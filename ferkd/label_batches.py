"""Photographs -> crops -> batches -> the teacher's answers: every photo is decoded once, its crops are cut by threads and shown in batches.

Batches are formed inside one shard, counted from its first crop, and always have the same number of rows, because the last bits of a
teacher's answers depend on how many rows it sees at once. So a shard depends neither on where the work was broken off nor on who did it.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ferkd.crops import draw_crops, take_crop
from ferkd.errors import InputError, SourceLost
from ferkd.label_crew import Task
from ferkd.label_plan import AUTOCAST_DTYPE, Job
from ferkd.like import check_photo
from ferkd.records import pack_boxes, pack_labels
from ferkd.shards import LabelledImage
from ferkd.sources import read_photo
from ferkd.teacher import answer_logits

PREFETCH_BYTES = 512 << 20  # of crops waiting for the teacher


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
    path, photos = job.plan.paths[image], job.train.photos
    try:
        photo, crc = read_photo(photos, path, apply_exif=job.like is None or job.like.exif_applied)
        height, width = photo.shape[1:]
        if job.like is None:
            boxes, flips = draw_crops(job.plan.crop_settings, image, np.arange(job.plan.crops), width, height)
    except SourceLost as error:  # a disk that went away must not end as a store of failures
        raise InputError(f"{error.stops}: what is labelled so far is kept") from error
    except InputError as error:
        return _CutPhoto(None, None, 0, 0, 0, str(error).removeprefix(f"{photos.name(path)}: "))
    if job.like is not None:
        if not job.like.entry(image).width:
            return _CutPhoto(None, None, 0, 0, 0, job.like.manifest.failed.get(path, "has no crops in the other store"))
        check_photo(job.like, image, crc, photos.name(path))
        boxes, flips = job.like.read(image).boxes(np.arange(job.plan.crops))
    size, interpolation = job.teacher.preprocessing.input_size, job.teacher.preprocessing.interpolation
    pixels = torch.empty(job.plan.crops, size, size, 3, dtype=torch.uint8)
    channels_first = pixels.permute(0, 3, 1, 2)
    for i, (box, flip) in enumerate(zip(boxes.tolist(), flips.tolist(), strict=True)):
        channels_first[i] = take_crop(photo, box, flip, size, interpolation)
    return _CutPhoto(pixels, pack_boxes(boxes, flips), width, height, crc, None)


def _shown(job: Job, task: Task) -> range:
    """The photos that are shown for a task: its own, and those before with which the batch of its first crop begins."""
    crops, rows = job.plan.crops, job.plan.batch_size
    start = task.shard * job.plan.shard_images
    return range(start + (task.first - start) * crops // rows * rows // crops, task.last + 1)


def _cut_photos(job: Job, tasks: Iterable[Task]) -> Iterator[tuple[Task, int, _CutPhoto]]:
    """The photos that are shown for tasks, in order, decoded ahead by threads, across tasks too: Pillow and the resampling let go of the
    interpreter lock."""
    photos = ((task, image) for task in tasks for image in _shown(job, task))
    if job.threads == 0:
        yield from ((task, image, _cut_photo(job, image)) for task, image in photos)
        return
    size = job.teacher.preprocessing.input_size
    ahead = max(1, min(4 * job.threads, PREFETCH_BYTES // (job.plan.crops * size * size * 3)))
    waiting: collections.deque[tuple[Task, int, Future[_CutPhoto]]] = collections.deque()

    def first() -> tuple[Task, int, _CutPhoto]:
        task, image, future = waiting.popleft()
        return task, image, future.result()

    pool = ThreadPoolExecutor(job.threads, thread_name_prefix="decode")
    try:
        for task, image in photos:
            waiting.append((task, image, pool.submit(_cut_photo, job, image)))
            if len(waiting) > ahead:
                yield first()
        while waiting:
            yield first()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Answers(NamedTuple):
    """A batch's answers [B, k], of which the `rows` count; on a GPU they are there when `arrived` is."""

    ids: Tensor
    probs: Tensor
    rows: slice
    arrived: torch.cuda.Event | None


class _Answering:
    """Shows batches to the teacher.

    On a GPU pixels travel on a stream of their own, from pinned memory, and answers come back without being waited for: while a batch is
    computed, the host packs the answers of the one before and fills the next.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.copies = torch.cuda.Stream(job.device) if job.device.type == "cuda" else None
        self.ahead = 1 if self.copies else 0  # batches shown whose answers are not waited for
        size = job.teacher.preprocessing.input_size
        # On a GPU the second is filled while the first is still on its way.
        shape = (job.plan.batch_size, size, size, 3)
        self.buffers = [torch.empty(shape, dtype=torch.uint8, pin_memory=self.copies is not None) for _ in range(1 + self.ahead)]
        self.shown = 0
        self.under_way: collections.deque[_Answers] = collections.deque()

    @property
    def buffer(self) -> Tensor:
        """Where the next batch's pixels go: uint8 [B, S, S, 3]."""
        return self.buffers[self.shown % len(self.buffers)]

    def show(self, filled: int, known: int) -> None:
        """Shows the buffer, of which the first `filled` rows are filled; the others repeat the last, so that the teacher always sees as
        many. The first `known` are labelled already.
        """
        buffer, rows = self.buffer, slice(known, filled)
        buffer[filled:] = buffer[filled - 1]
        self.shown += 1
        if self.copies is None:
            self.under_way.append(_Answers(*self._answer(buffer), rows, None))
            return
        computing = torch.cuda.current_stream(self.job.device)
        with torch.cuda.stream(self.copies):
            pixels = buffer.to(self.job.device, non_blocking=True)
        computing.wait_stream(self.copies)
        pixels.record_stream(computing)
        ids, probs = (answer.to("cpu", non_blocking=True) for answer in self._answer(pixels))  # into pinned memory
        arrived = torch.cuda.Event()
        arrived.record(computing)
        self.under_way.append(_Answers(ids, probs, rows, arrived))

    def _answer(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The k most probable classes and their probabilities, [B, k] each, of pixels [B, S, S, 3]."""
        job = self.job
        pixels = pixels.permute(0, 3, 1, 2)
        logits = answer_logits(job.teacher.model, job.teacher.preprocessing, pixels, AUTOCAST_DTYPE[job.settings.autocast])
        with torch.inference_mode():
            probs, ids = torch.softmax(job.classes.select(logits), 1).topk(job.plan.k, dim=1)
        return ids, probs

    def fetch(self, everything: bool) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """The answers (ids, probabilities) [rows, k] of the batches shown; on a GPU all but the last, unless `everything` is asked for.

        A batch whose answers were fetched has left its buffer.
        """
        while len(self.under_way) > (0 if everything else self.ahead):
            ids, probs, rows, arrived = self.under_way.popleft()
            if arrived is not None:
                arrived.synchronize()
            yield ids[rows].numpy(), probs[rows].numpy()


def label_images(job: Job, tasks: Iterable[Task], on_crops: Callable[[int], None]) -> Iterator[LabelledImage]:
    """Labels the photos of tasks, in order. `on_crops` is told how many crops are new.

    Tasks are taken as their photos are needed: to be decoded ahead, and on a GPU for a batch that is computed while the answers of the task
    before are written. A task's first batch may begin with crops of photos before its first, which are labelled already: they are shown
    again, since a batch holds the same crops in every run. A photo that cannot be read takes part as black crops, so that the batches after
    it do not depend on that.
    """
    crops, rows = job.plan.crops, job.plan.batch_size
    answering = _Answering(job)
    cut: collections.deque[tuple[int, _CutPhoto]] = collections.deque()  # shown, at least in part, and not yet answered
    ids = np.empty((0, job.plan.k), np.int64)
    probs = np.empty((0, job.plan.k), np.float32)
    filled = 0

    def answered(everything: bool) -> Iterator[LabelledImage]:
        nonlocal ids, probs
        for more_ids, more_probs in answering.fetch(everything):
            ids, probs = np.concatenate([ids, more_ids]), np.concatenate([probs, more_probs])
            on_crops(len(more_ids))
        while cut and len(ids) >= crops:
            image, photo = cut.popleft()
            yield _labelled(job, image, photo, ids[:crops], probs[:crops])
            ids, probs = ids[crops:], probs[crops:]

    for task, image, photo in _cut_photos(job, tasks):
        if image >= task.first:
            cut.append((image, photo._replace(pixels=None)))
        start = task.shard * job.plan.shard_images
        known = (task.first - start) * crops  # of the shard's crops: those labelled already
        before = (image - start) * crops  # those of the photos before
        done = max(0, known // rows * rows - before)
        while done < crops:
            take = min(rows - filled, crops - done)
            answering.buffer[filled : filled + take] = 0 if photo.pixels is None else photo.pixels[done : done + take]
            filled, done = filled + take, done + take
            if filled == rows or (image == task.last and done == crops):
                answering.show(filled, max(0, known - (before + done - filled)))
                filled = 0
                yield from answered(everything=False)
    yield from answered(everything=True)


def _labelled(job: Job, image: int, photo: _CutPhoto, ids: NDArray[np.int64], probs: NDArray[np.float32]) -> LabelledImage:
    """Packs one photo's answers. Raises InputError when the teacher answered NaN."""
    if photo.failure is not None:
        return LabelledImage(0, 0, photo.crc, None, None, photo.failure)
    finite = np.isfinite(probs).all(axis=1)
    if not finite.all():
        raise InputError(
            f"{job.train.photos.name(job.plan.paths[image])}: the teacher answers NaN to its crop {int(finite.argmin())} (counted from 0); "
            "are its weights broken, or does it overflow (try --autocast none)? What is labelled so far is kept"
        )
    words = pack_labels(ids, probs, job.plan.label_codec, job.plan.classes)
    boxes = photo.box_words if job.plan.box_codec == "stored" else None
    return LabelledImage(photo.width, photo.height, photo.crc, boxes, words)
