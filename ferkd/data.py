"""From stored labels to batches: the pixels and label words of the crops that a step's visits name (see stream.py).

An image is decoded once a visit, and only the crops it needs are cut; discarded crops are never touched.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from ferkd import process
from ferkd.crops import CropSettings, Interpolation, center_view, draw_crops, take_crop
from ferkd.errors import InputError, SourceLost, StoreError
from ferkd.photos import DecodedSource, SplitPhotos
from ferkd.process import LARGER
from ferkd.regions import Region, RegionPolicy, region_of
from ferkd.sources import Split
from ferkd.store import ImageLabels, LabelStore
from ferkd.stream import StreamSampler, Visit, in_order, keyed_hash

# ------------------------------------------------------------------------------------------------------------------- the pixels


class ImageCrops(NamedTuple):
    """What one visit brings: pixels uint8 [m, 3, S, S]; label words int32 [m, W], None without labels; the ground truth's class id.

    `teacher_pixels`: the same crops as an online teacher is to see them, where that is not as the student does. `unreadable`: what is wrong
    with the photographs that should have been shown instead.
    """

    pixels: Tensor
    words: Tensor | None
    target: int
    teacher_pixels: Tensor | None = None
    unreadable: tuple[str, ...] = ()


class CropBatch(NamedTuple):
    """One step's rows, image-major: pixels uint8 [B, 3, S, S], label words int32 [B, W] or None, target int64 [B]; `teacher_pixels` and
    `unreadable` as in ImageCrops."""

    pixels: Tensor
    words: Tensor | None
    target: Tensor
    teacher_pixels: Tensor | None = None
    unreadable: tuple[str, ...] = ()

    def rows(self, rows: slice) -> CropBatch:
        """Some of the rows."""
        words, teacher_pixels = (None if field is None else field[rows] for field in (self.words, self.teacher_pixels))
        return CropBatch(self.pixels[rows], words, self.target[rows], teacher_pixels)


@dataclasses.dataclass(frozen=True)
class CropView:
    """How a crop becomes the student's input: `size` pixels square, resampled with `interpolation`."""

    size: int
    interpolation: Interpolation = "bilinear"


def pixel_rows(memory: Tensor, size: int) -> Tensor:
    """A block of uint8 memory as [rows, 3, size, size], laid out as [rows, size, size, 3]: as photographs are decoded and crops resized."""
    return memory.view(-1, size, size, 3).permute(0, 3, 1, 2)


def cut_crops(photo: Tensor, boxes: np.ndarray, flips: np.ndarray, view: CropView) -> Tensor:
    """The crops of a photograph, uint8 [m, 3, S, S], laid out as [m, S, S, 3]: torch.stack would take each apart into planes."""
    pixels = pixel_rows(torch.empty(len(boxes) * view.size**2 * 3, dtype=torch.uint8), view.size)
    for row, (box, flip) in enumerate(zip(boxes.tolist(), flips.tolist(), strict=True)):
        pixels[row] = take_crop(photo, box, flip, view.size, view.interpolation)
    return pixels


REMEMBERED_WALKS = 16_384
"""Images whose walk a loader process keeps: 13 MB at 200 crops, whatever the size of the store."""
READ_TOGETHER = 64
"""Visits whose labels are read, and their walks found, at once: one by one, the calls cost more than the work."""


class StoredCrops(Dataset[ImageCrops]):
    """Stored crops of the usable images of a store, indexed by Visit. `usable` maps the stream's images to the store's, int64 [N]."""

    def __init__(
        self, photos: DecodedSource, store: LabelStore, usable: np.ndarray, policy: RegionPolicy, view: CropView, seed: int
    ) -> None:
        self.photos, self.store, self.usable, self.policy, self.view, self.seed = photos, store, usable, policy, view, seed
        self._walks: dict[int, npt.NDArray[np.int32]] = {}

    def __len__(self) -> int:
        return len(self.usable)

    def __getitem__(self, visit: Visit) -> ImageCrops:
        (item,) = self.each([visit])
        return item

    def each(self, visits: Sequence[Visit]) -> Iterator[ImageCrops]:
        """What the visits bring, one after the other: the same as indexing with each of them, at less cost."""
        for first in range(0, len(visits), READ_TOGETHER):
            together = visits[first : first + READ_TOGETHER]
            labels = [self.store.read(int(self.usable[visit.image])) for visit in together]
            walks = self.walks(labels)
            for visit, of_image, walk in zip(together, labels, walks, strict=True):
                yield self._cut(visit, of_image, walk)

    def walks(self, labels: Sequence[ImageLabels]) -> list[npt.NDArray[np.int32]]:
        """Each image's surviving crops in the order of its walk. Remembered, which on small datasets halves the cost of a visit."""
        if len(self._walks) + len(labels) > REMEMBERED_WALKS:
            self._walks.clear()
        new = list({of_image.image: of_image for of_image in labels if of_image.image not in self._walks}.values())
        if new:
            numbers = np.array([of_image.image for of_image in new])
            hashes = keyed_hash(self.seed, numbers[:, None], np.arange(self.store.crops))
            for of_image, row, survives in zip(new, hashes, surviving_crops(self.store, new, self.policy), strict=True):
                survivors = np.flatnonzero(survives)
                self._walks[of_image.image] = survivors[in_order(row[: len(survivors)])].astype(np.int32)
        return [self._walks[of_image.image] for of_image in labels]

    def _cut(self, visit: Visit, labels: ImageLabels, walk: npt.NDArray[np.int32]) -> ImageCrops:
        crops = walk[(visit.walk + np.arange(visit.crops)) % len(walk)]
        boxes, flips = labels.boxes(crops)
        pixels = cut_crops(self.photos(labels.image), boxes, flips, self.view)
        words = torch.from_numpy(labels.label_words[crops].view(np.int32))
        return ImageCrops(pixels, words, labels.target)


MOST_UNREADABLE = 100
"""Photographs in a row that may be passed over before the folder itself is doubted."""


class FreshCrops(Dataset[ImageCrops]):
    """Crops drawn anew at every visit, for training without labels: crop number `walk` of image i is drawn from (seed, i, walk).

    `teacher_view`: how an online teacher sees them, where that differs from the student's view. In the place of a photograph that cannot
    be read the next one that can is shown, which depends on nothing but the folder.
    """

    def __init__(
        self, photos: DecodedSource, targets: np.ndarray, settings: CropSettings, view: CropView, teacher_view: CropView | None = None
    ) -> None:
        self.photos, self.targets, self.settings, self.view = photos, targets, settings, view
        self.teacher_view = None if teacher_view == view else teacher_view

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, visit: Visit) -> ImageCrops:
        image, unreadable = visit.image, []
        while True:
            try:
                photo = self.photos(image)
                break
            except (StoreError, SourceLost):  # a disk that went away must not end as other crops than were asked for
                raise
            except InputError as error:
                unreadable.append(str(error))
                if len(unreadable) == min(MOST_UNREADABLE, len(self)):
                    raise InputError(
                        f"{len(unreadable)} photographs one after the other cannot be read, the first: {unreadable[0]}"
                    ) from error
                image = (image + 1) % len(self)
        numbers = visit.walk + np.arange(visit.crops)
        boxes, flips = draw_crops(self.settings, image, numbers, photo.shape[2], photo.shape[1])
        pixels = cut_crops(photo, boxes, flips, self.view)
        teacher_pixels = None if self.teacher_view is None else cut_crops(photo, boxes, flips, self.teacher_view)
        return ImageCrops(pixels, None, int(self.targets[image]), teacher_pixels, tuple(unreadable))


def surviving_crops(store: LabelStore, labels: Sequence[ImageLabels], policy: RegionPolicy) -> npt.NDArray[np.bool_]:
    """Which crops of some images the policy does not discard, bool [images, M]. Raises StoreError for an image that has none."""
    if not policy.discards:
        return np.ones((len(labels), store.crops), np.bool_)
    words = np.concatenate([of_image.label_words for of_image in labels])
    confidence = store.confidence(words, np.array([of_image.target for of_image in labels]), policy.confidence)
    survives: npt.NDArray[np.bool_] = region_of(torch.from_numpy(confidence), policy).numpy() != Region.DISCARDED
    if not survives.any(axis=1).all():
        path = labels[int(np.flatnonzero(~survives.any(axis=1))[0])].path
        raise StoreError(
            f"{store.source}: {path} has no crop left under {policy}, though the policy's list of usable images names it; "
            f"delete {store.path}/policies"
        )
    return survives


def gather(dataset: Dataset[ImageCrops], visits: Sequence[Visit]) -> CropBatch:
    """The rows of one step's visits, image-major. In a loader process they lie in memory shared with the main one from the start.

    Raises InputError for a photograph that cannot be shown, and where shared memory has run out.
    """
    rows = sum(visit.crops for visit in visits)
    pixels, teacher_pixels, words, targets, row = None, None, [], [], 0
    unreadable: list[str] = []
    for item in dataset.each(visits) if isinstance(dataset, StoredCrops) else map(dataset.__getitem__, visits):
        crops = len(item.pixels)
        # Copied at once, while a crop is still in the processor's cache; its own memory then serves the next one.
        pixels = _put(item.pixels, row, pixels, rows)
        if item.teacher_pixels is not None:
            teacher_pixels = _put(item.teacher_pixels, row, teacher_pixels, rows)
        words += [] if item.words is None else [item.words]
        targets += [item.target] * crops
        unreadable += item.unreadable
        row += crops
    assert pixels is not None
    return CropBatch(pixels, torch.cat(words) if words else None, torch.tensor(targets), teacher_pixels, tuple(unreadable))


def _put(crops: Tensor, row: int, batch: Tensor | None, rows: int) -> Tensor:
    """The batch of `rows` crops, made with the first of them, with `crops` put in from `row` on."""
    if batch is None:
        size = crops.shape[-1]
        batch = pixel_rows(_batch_memory(rows * size**2 * 3), size)
    batch[row : row + len(crops)] = crops
    return batch


def _batch_memory(size: int) -> Tensor:
    """`size` bytes, uint8. In a loader process they are shared, or else sending them to the main process would copy them."""
    if get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    try:
        return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
    except RuntimeError as error:
        raise InputError(_full(size)) from error


def _full(batch: int) -> str:
    return (
        f"workers: no room for a batch of {batch / 2**20:,.1f} MiB in shared memory ({process.free_shared_memory() / 2**20:,.1f} MiB "
        f"free); {LARGER}, or take fewer --workers"
    )


UNREADABLE = -1


class CenterViews(Dataset[tuple[Tensor, int, int]]):
    """The evaluation view of every photograph of a split: pixels uint8 [3, S, S], class id, and the photograph's number. One that cannot be
    read has the class id UNREADABLE."""

    def __init__(self, split: Split, class_of_folder: np.ndarray, size: int, crop_pct: float, interpolation: Interpolation) -> None:
        self.split, self.photos = split, SplitPhotos(split)
        self.targets = class_of_folder[split.folder_of]
        self.size, self.crop_pct, self.interpolation = size, crop_pct, interpolation

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, image: int) -> tuple[Tensor, int, int]:
        try:
            photo = self.photos(image)
        except SourceLost:
            raise
        except InputError:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), UNREADABLE, image
        return center_view(photo, self.size, self.crop_pct, self.interpolation), int(self.targets[image]), image

    def name(self, image: int) -> str:
        """What people call the photograph."""
        return self.split.name(image)


class _ErrorsAsValues(Dataset[Any]):
    """Hands an InputError out as an item: raised in a worker it would reach the main process as a page of traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except InputError as error:
            return error


class _Batches(_ErrorsAsValues):
    """The same for whole steps: DataLoader asks __getitems__ for all visits of a step at once."""

    def __getitems__(self, visits: Sequence[Visit]) -> CropBatch | InputError:
        try:
            return gather(self.dataset, visits)
        except InputError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclasses.dataclass(frozen=True)
class _FirstError:
    """Collates a batch, or takes the first of its errors for the whole of it."""

    collate: Callable[[Any], Any]

    def __call__(self, items: Sequence[Any]) -> Any:
        for item in items:
            if isinstance(item, InputError):
                return item
        try:
            return self.collate(items)
        except RuntimeError as error:  # default_collate shares its tensors at once
            if "shared memory" not in str(error):
                raise
            return InputError(_full(len(items) * items[0][0].numel()))


def loaded(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of one of this module's loaders. Raises the InputError that a worker met, as it was, in its place in the order."""
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def training_loader(
    dataset: Dataset[ImageCrops], sampler: StreamSampler, workers: int, pin_memory: bool, reserve: int = 0
) -> DataLoader[Any]:
    """CropBatches of the stream in order, to be read by `loaded`. Workers only change who does the work, never its result.
    `reserve`: bytes of shared memory to leave for another loader of this process.

    Raises InputError where the workers' batches would not fit into shared memory.
    """
    sizes = [dataset.view.size] if isinstance(dataset, StoredCrops | FreshCrops) else []
    if isinstance(dataset, FreshCrops) and dataset.teacher_view is not None:
        sizes.append(dataset.teacher_view.size)
    return DataLoader(
        _Batches(dataset),
        batch_sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=batches_ahead(workers, sampler.stream.batch_size // sampler.world, *sizes, reserve=reserve),
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else starting the loader would draw from the global one, which a resumed run must find untouched
    )


def evaluation_loader(views: Dataset[Any], batch_size: int, workers: int, ahead: int | None = None) -> DataLoader[Any]:
    """The items of `views` in order, collated, to be read by `loaded`. `ahead`: batches of each worker that there is known to be room for.

    Raises InputError as training_loader does, unless `ahead` is given.
    """
    if workers == 0:
        ahead = None
    elif ahead is None:
        ahead = batches_ahead(workers, batch_size, *([views.size] if isinstance(views, CenterViews) else []))
    return DataLoader(
        _ErrorsAsValues(views),
        batch_size=batch_size,
        collate_fn=_FirstError(default_collate),
        num_workers=workers,
        prefetch_factor=ahead,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # evaluating must not draw from the global one, whose state belongs to training
    )


MOST_BATCHES_AHEAD = 4


def batches_memory(workers: int, rows: int, *sizes: int, ahead: int = 1) -> int:
    """Bytes of shared memory that one process's loader fills: batches of `rows` pictures of each of `sizes` pixels square, `ahead` of each
    worker, the one in use and the one that follows it."""
    return (workers * ahead + 2) * rows * sum(size * size * 3 for size in sizes) if workers else 0


def batches_ahead(workers: int, rows: int, *sizes: int, reserve: int = 0) -> int | None:
    """How many batches, `rows` pictures of each of `sizes` pixels square, each loader process may be ahead, so that shared memory holds
    them all and `reserve` bytes more.

    Found out beforehand, because where shared memory is full the thread that sends a batch dies of it, and training would wait for ever.
    Raises InputError when not even one batch for each loader fits.
    """
    if workers == 0:
        return None
    processes = process.local_processes()  # each has loaders of its own
    free = process.free_shared_memory()
    for ahead in range(MOST_BATCHES_AHEAD, 0, -1):
        needed = processes * (batches_memory(workers, rows, *sizes, ahead=ahead) + reserve)
        if needed <= free:
            return ahead
    raise InputError(
        f"workers: the batches of {processes * workers} loader processes need {needed / 2**20:,.0f} MiB of shared memory, "
        f"and /dev/shm has {free / 2**20:,.0f} MiB free; {LARGER}, or take fewer --workers (0 needs none)"
    )


def start_worker(worker: int) -> None:
    """What every loader process does first."""
    torch.set_num_threads(1)  # workers share the cores; a pool of threads in each would only fight
    # A scheduler sends SIGTERM to the whole job, a terminal SIGINT. The main process answers, and may still need its loader for that.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
