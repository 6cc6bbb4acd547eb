"""From a store and photographs to batches: the right crops, cut exactly, discarded ones never touched, the wrong photo refused."""

from __future__ import annotations

import dataclasses
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import write_photos, write_store
from PIL import Image
from torch.utils.data import Dataset

import ferkd.photos
import ferkd.process
from ferkd.crops import CropSettings, decode, draw_crops, take_crop
from ferkd.data import (
    UNREADABLE,
    CenterViews,
    CropView,
    FreshCrops,
    StoredCrops,
    batches_ahead,
    evaluation_loader,
    gather,
    loaded,
    surviving_crops,
    training_loader,
)
from ferkd.distributed import Ranks
from ferkd.errors import InputError, SourceLost, StoreError
from ferkd.photos import DecodedPhotos, LabelledPhotos, SplitPhotos, check_same_photos
from ferkd.preprocessing import Preprocessing
from ferkd.recipes import TrainConfig
from ferkd.regions import Region, RegionPolicy, confidence_of, region_of
from ferkd.sources import scan_split
from ferkd.sources.folders import FolderPhotos
from ferkd.store import LabelStore
from ferkd.stream import CropStream, Phase, StreamSampler, Visit, crop_order
from ferkd.task import Job, plan_task
from ferkd.train import train

VIEW = CropView(16)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "data")


@pytest.fixture
def store(photos: Path, tmp_path: Path) -> LabelStore:
    return write_store(photos, tmp_path / "labels")


def stored(photos: Path, store: LabelStore, policy: RegionPolicy = RegionPolicy()) -> StoredCrops:
    usable = np.flatnonzero(store.scan(policy).usable)
    return StoredCrops(LabelledPhotos(FolderPhotos(photos / "train"), store), store, usable, policy, VIEW, seed=0)


def test_a_visit_brings_the_boxes_and_words_that_were_stored(photos: Path, store: LabelStore) -> None:
    """Every crop of an image, over a whole walk: pixels are the stored box's, words are the stored record's."""
    for image in range(0, len(store), 5):
        labels = store.read(image)
        photo = decode(photos / "train" / labels.path)
        boxes, flips = labels.boxes(np.arange(store.crops))
        expected = {
            words.tobytes(): take_crop(photo, box, flip, 16, "bilinear")
            for words, box, flip in zip(labels.label_words, boxes, flips, strict=True)
        }
        assert len(expected) == store.crops  # the words tell the crops apart
        seen = set()
        for walk in range(0, store.crops, 4):
            item = stored(photos, store)[Visit(image, walk, 4)]
            assert item.words is not None
            assert item.target == labels.target
            for words, pixels in zip(item.words.numpy(), item.pixels, strict=True):
                assert torch.equal(pixels, expected[words.tobytes()])
                seen.add(words.tobytes())
        assert len(seen) == store.crops  # none repeats before all were used


def test_a_walk_cycles_when_it_is_longer_than_the_survivors(photos: Path, store: LabelStore) -> None:
    dataset = stored(photos, store)
    first, again = dataset[Visit(2, 0, 12)], dataset[Visit(2, 12, 12)]
    assert torch.equal(first.pixels, again.pixels)
    more = dataset[Visit(2, 0, 24)]
    assert torch.equal(more.pixels, torch.cat([first.pixels, again.pixels]))


def test_discarded_crops_are_never_cut(photos: Path, store: LabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = RegionPolicy(discard_below=0.6)
    cut = []
    original = ferkd.data.take_crop
    monkeypatch.setattr(ferkd.data, "take_crop", lambda photo, box, *rest: cut.append(tuple(box)) or original(photo, box, *rest))
    dataset = stored(photos, store, policy)
    discarded = 0
    for place in range(len(dataset)):
        cut.clear()
        image = int(dataset.usable[place])
        labels = store.read(image)
        ids, probs = store.unpack(labels.label_words)
        region = region_of(confidence_of(torch.from_numpy(ids), torch.from_numpy(probs), None, 3, "max"), policy)
        boxes, _ = labels.boxes(np.arange(store.crops))
        allowed = {tuple(box) for box in boxes[region.numpy() != Region.DISCARDED].tolist()}
        item = dataset[Visit(place, 0, 12)]
        assert set(cut) == allowed
        assert len(item.pixels) == 12
        discarded += store.crops - len(allowed)
    assert discarded > 20


def test_images_without_survivors_are_left_out_and_counted(photos: Path, store: LabelStore) -> None:
    strict = RegionPolicy(discard_below=0.995)
    scan = store.scan(strict)
    for image in range(len(store)):
        if scan.usable[image]:
            assert surviving_crops(store, [store.read(image)], strict).any()
        else:
            with pytest.raises(StoreError, match="no crop left"):
                surviving_crops(store, [store.read(image)], strict)
    assert 0 < scan.usable.sum() < len(store)


def test_an_image_that_could_not_be_read_is_not_usable(photos: Path, tmp_path: Path) -> None:
    store = write_store(photos, tmp_path / "gap", unreadable=7)
    assert np.flatnonzero(~store.scan(RegionPolicy()).usable).tolist() == [7]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_batches(photos: Path, store: LabelStore, workers: int) -> None:
    dataset = stored(photos, store)
    stream = CropStream(len(dataset), 16, [Phase(4, 4), Phase(1, 3)], 0)
    alone = list(training_loader(dataset, StreamSampler(stream, 0, 7), 0, False))
    helped = list(training_loader(dataset, StreamSampler(stream, 0, 7), workers, False))
    assert len(alone) == 7
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.words, other.words)
        assert torch.equal(one.target, other.target)
        assert one.pixels.shape == (16, 3, 16, 16)
        assert one.words.shape == (16, 2)
        assert one.target.shape == (16,)


def test_rows_are_image_major(photos: Path, store: LabelStore) -> None:
    dataset = stored(photos, store)
    batch = gather(dataset, [Visit(0, 0, 4), Visit(20, 0, 2)])
    assert batch.target.tolist() == [store.entry(0).target] * 4 + [store.entry(20).target] * 2
    first, second = dataset[Visit(0, 0, 4)], dataset[Visit(20, 0, 2)]
    assert torch.equal(batch.pixels, torch.cat([first.pixels, second.pixels]))
    assert batch.words is not None
    assert first.words is not None
    assert second.words is not None
    assert torch.equal(batch.words, torch.cat([first.words, second.words]))


@pytest.mark.parametrize("policy", [RegionPolicy(), RegionPolicy(0.6), RegionPolicy(0.2, discard_above=0.9, confidence="target")])
def test_visits_read_together_are_those_read_one_by_one(
    photos: Path, store: LabelStore, policy: RegionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ferkd.data, "READ_TOGETHER", 4)
    monkeypatch.setattr(ferkd.data, "REMEMBERED_WALKS", 10)  # forgets while it reads
    usable = np.flatnonzero(store.scan(policy).usable)
    visits = [Visit(place % len(usable), walk, 2) for walk, place in enumerate([0, 1, 1, 2, 3, *range(len(usable)), 5, 5, 0])]
    words, targets = [], []
    for visit in visits:
        labels = store.read(int(usable[visit.image]))
        ids, probs = (torch.from_numpy(part) for part in store.unpack(labels.label_words))
        confidence = confidence_of(ids, probs, torch.full((store.crops,), labels.target), store.classes, policy.confidence)
        survivors = np.flatnonzero(region_of(confidence, policy).numpy() != Region.DISCARDED)
        order = crop_order(len(survivors), 0, labels.image)
        words += [labels.label_words[survivors[order[(visit.walk + crop) % len(order)]]] for crop in range(2)]
        targets += [labels.target] * 2
    dataset = stored(photos, store, policy)
    batch = gather(dataset, visits)
    assert batch.words is not None
    assert np.array_equal(batch.words.numpy().view(np.uint32), np.stack(words))
    assert batch.target.tolist() == targets
    assert torch.equal(batch.pixels, torch.cat([stored(photos, store, policy)[visit].pixels for visit in visits]))
    assert len(dataset._walks) <= 10


@pytest.mark.parametrize("workers", [0, 1])
def test_pixels_lie_as_they_were_decoded(photos: Path, store: LabelStore, workers: int) -> None:
    """Taken apart into planes, or copied once more on the way, they cost the loader a third of its speed."""
    dataset = stored(photos, store)
    sampler = StreamSampler(CropStream(len(dataset), 16, [Phase(4, 2)], 0), 0, 2)
    for batch in loaded(training_loader(dataset, sampler, workers, pin_memory=False)):
        assert batch.pixels.shape == (16, 3, 16, 16)
        assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
        assert batch.pixels.is_shared() == (workers > 0)


def test_decoded_photos_are_the_files_photos(photos: Path, store: LabelStore) -> None:
    files = LabelledPhotos(FolderPhotos(photos / "train"), store)
    cached = DecodedPhotos(files, range(len(store)), threads=2)
    assert all(torch.equal(cached(image), files(image)) for image in range(len(store)))


def test_fresh_crops_follow_the_keyed_draw(photos: Path) -> None:
    split = scan_split(photos, "train")
    settings = CropSettings(seed=9, scale=(0.3, 1.0))
    item = FreshCrops(SplitPhotos(split), split.folder_of, settings, VIEW)[Visit(5, 40, 3)]
    photo = decode(split.photos.root / split.paths[5])
    boxes, flips = draw_crops(settings, 5, np.arange(40, 43), photo.shape[2], photo.shape[1])
    expected = torch.stack([take_crop(photo, box, flip, 16, "bilinear") for box, flip in zip(boxes, flips, strict=True)])
    assert torch.equal(item.pixels, expected)
    assert item.words is None
    assert item.target == split.folder_of[5]


def test_a_changed_photo_is_refused_by_name(photos: Path, store: LabelStore) -> None:
    path = photos / "train" / store.entry(3).path
    Image.new("RGB", (store.entry(3).width, store.entry(3).height)).save(path)
    with pytest.raises(StoreError, match=r"blue/3\.png: not the photograph that was labelled"):
        stored(photos, store)[Visit(3, 0, 4)]


def test_another_dataset_is_refused_before_training(photos: Path, store: LabelStore, tmp_path: Path) -> None:
    check_same_photos(FolderPhotos(photos / "train"), store)
    other = write_photos(tmp_path / "other", seed=1)
    with pytest.raises(StoreError, match="not the photograph that was labelled"):
        check_same_photos(FolderPhotos(other / "train"), store)
    with pytest.raises(StoreError, match="is this the store of another dataset"):
        check_same_photos(FolderPhotos(tmp_path), store)


def test_the_cache_refuses_what_does_not_fit(photos: Path, store: LabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    files = LabelledPhotos(FolderPhotos(photos / "train"), store)
    size = sum(files(image).numel() for image in range(len(store)))
    monkeypatch.setattr(ferkd.process, "available_memory", lambda: 2 * size)
    DecodedPhotos(files, range(len(store)), 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each process keeps its own
    with pytest.raises(InputError, match="that each of 2 processes can have; train without --cache decoded"):
        DecodedPhotos(files, range(len(store)), 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(ferkd.process, "available_memory", lambda: 2 * size - 1)
    with pytest.raises(InputError, match="GiB of free memory; train without --cache decoded"):
        DecodedPhotos(files, range(len(store)), 1)


def test_cached_val_images_are_the_views_and_have_to_fit(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = plan_task(Job(photos, "python:photos:tiny_net", photos / "run", TrainConfig()), Ranks())
    seen = Preprocessing(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear", 1.0)
    plain, cached = task.views(seen, False, 2), task.views(seen, True, 2)
    assert len(plain) == len(cached) == 12
    for number in range(12):
        pixels, target, image = cached[number]
        assert torch.equal(pixels, plain[number][0])
        assert (int(target), int(image)) == plain[number][1:]
    monkeypatch.setattr(ferkd.process, "available_memory", lambda: 12 * 3 * 16 * 16)
    with pytest.raises(InputError, match="cache: 12 decoded val images fill"):
        task.views(seen, True, 2)


def test_memory_that_a_container_lacks_is_not_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = ferkd.process.available_memory()
    assert 2**20 < free < 2**50
    monkeypatch.setattr(ferkd.process, "CGROUP", str(tmp_path))
    for name, text in (("memory.max", "9000"), ("memory.current", "5000"), ("memory.stat", "anon 4000\ninactive_file 700")):
        (tmp_path / name).write_text(f"{text}\n")
    assert ferkd.process.available_memory() == 9000 - 5000 + 700
    (tmp_path / "memory.max").write_text("max\n")
    assert ferkd.process.available_memory() > 2**20
    (tmp_path / "memory").mkdir()
    for name, text in (("limit_in_bytes", "8000"), ("usage_in_bytes", "8100"), ("stat", "inactive_file 1\ntotal_inactive_file 60")):
        (tmp_path / "memory" / f"memory.{name}").write_text(f"{text}\n")
    assert ferkd.process.available_memory() == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_s_error_arrives_as_it_was(photos: Path, store: LabelStore, workers: int) -> None:
    """Not as a page of the worker's traceback, and after the batches that came before it."""
    path = photos / "train" / store.entry(3).path
    whole = path.read_bytes()
    path.write_bytes(b"no picture")
    try:
        dataset = stored(photos, store)
        sampler = StreamSampler(CropStream(len(dataset), 4, [Phase(4, len(dataset))], 0), 0, len(dataset))
        batches = loaded(training_loader(dataset, sampler, workers, pin_memory=False))
        seen = []
        with pytest.raises(InputError) as caught:
            seen.extend(batches)
        assert str(caught.value) == f"{path}: not an image that Pillow can decode (10 bytes); remove it or replace it"
        assert len(seen) == next(step for step in range(len(dataset)) if sampler.stream.visits(step)[0].image == 3)
        split = scan_split(photos, "train")
        views = CenterViews(split, np.arange(3), 16, 1.0, "bilinear")
        classes = torch.cat([targets for _, targets, _ in loaded(evaluation_loader(views, 2, workers))])
        assert (classes == UNREADABLE).nonzero().flatten().tolist() == [3]
        with pytest.raises(InputError, match=r"^no such view$"):
            list(loaded(evaluation_loader(_NoViews(), 2, workers)))
    finally:
        path.write_bytes(whole)


def test_a_class_folder_that_went_away_is_no_unreadable_photograph(photos: Path) -> None:
    """It would raise the accuracy, and choose the best weights."""
    split = scan_split(photos, "val")
    views = CenterViews(split, np.arange(3), 16, 1.0, "bilinear")
    crops = FreshCrops(SplitPhotos(split), split.folder_of, CropSettings(seed=9, scale=(0.3, 1.0)), VIEW)
    (photos / "val" / split.folders[1]).rename(photos / "away")
    for workers in (0, 1):
        with pytest.raises(SourceLost):
            list(loaded(evaluation_loader(views, 2, workers)))
    with pytest.raises(SourceLost):
        crops[Visit(int(np.flatnonzero(split.folder_of == 1)[0]), 0, 2)]


class _NoViews(Dataset[bool]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> bool:
        raise InputError("no such view")


class _Signalled(Dataset[bool]):
    """Items 0 and 1: whether a worker ignores SIGINT and SIGTERM."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> bool:
        return signal.getsignal((signal.SIGINT, signal.SIGTERM)[index]) == signal.SIG_IGN


def test_workers_leave_signals_to_the_main_process() -> None:
    assert [bool(ignored) for ignored in loaded(evaluation_loader(_Signalled(), 1, 1))] == [True, True]


def test_a_cache_that_shared_memory_cannot_hold_is_refused(photos: Path, store: LabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(block: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(InputError, match="do not fit into shared memory; make /dev/shm larger"):
        DecodedPhotos(LabelledPhotos(FolderPhotos(photos / "train"), store), range(len(store)), 1)


def test_datasets_pickle_for_spawned_workers(photos: Path, store: LabelStore) -> None:
    dataset = pickle.loads(pickle.dumps(stored(photos, store)))
    assert torch.equal(dataset[Visit(1, 0, 4)].pixels, stored(photos, store)[Visit(1, 0, 4)].pixels)


def test_a_deleted_photo_is_one_line(photos: Path, store: LabelStore) -> None:
    path = photos / "train" / store.entry(3).path
    path.unlink()
    dataset = stored(photos, store)
    sampler = StreamSampler(CropStream(len(dataset), 4, [Phase(4, len(dataset))], 0), 0, len(dataset))
    with pytest.raises(InputError, match=r"^[^\n]*blue/3\.png: cannot be read: No such file or directory$"):
        list(loaded(training_loader(dataset, sampler, 1, pin_memory=False)))


def shared_memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(ferkd.process, "free_shared_memory", lambda: size)


def test_loaders_run_no_further_ahead_than_shared_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = 64 * 3 * 224 * 224
    assert batches_ahead(0, 64, 224) is None
    for batches, ahead in ((10, 4), (9, 3), (8, 3), (6, 2), (4, 1)):
        shared_memory(monkeypatch, batches * batch)
        assert batches_ahead(2, 64, 224) == ahead
    shared_memory(monkeypatch, 7 * batch // 2)
    with pytest.raises(InputError, match=r"^workers: the batches of 2 loader processes need 37 MiB [^\n]* 32 MiB free; make"):
        batches_ahead(2, 64, 224)
    shared_memory(monkeypatch, 8 * batch)
    assert batches_ahead(2, 64, 224, reserve=2 * batch) == 2
    assert batches_ahead(2, 64, 224, reserve=4 * batch) == 1
    with pytest.raises(InputError, match="make /dev/shm larger"):
        batches_ahead(2, 64, 224, reserve=4 * batch + 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert batches_ahead(2, 64, 224) == 1


def test_an_evaluation_has_the_shared_memory_that_was_kept_for_it(
    photos: Path, store: LabelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it runs, training's batches lie in shared memory: what is free then is not looked at."""
    batch = 12 * 3 * 16 * 16
    asked: list[int] = []

    def free(enough: int) -> int:
        asked.append(enough)
        return enough if len(asked) == 1 else 0

    config = TrainConfig(epochs=2.0, batch_size=12, eval_every=1.0, workers=1, warmup_epochs=0.0)
    job = Job(photos, "python:photos:tiny_net", tmp_path / "run", config, store.path, say=lambda line: None)
    monkeypatch.setattr(ferkd.process, "free_shared_memory", lambda: free(6 * batch))  # a batch ahead, and two, of both loaders
    assert train(job)["steps"] == 4
    assert len(asked) == 1
    asked.clear()
    monkeypatch.setattr(ferkd.process, "free_shared_memory", lambda: free(6 * batch - 1))
    with pytest.raises(InputError, match="make /dev/shm larger"):
        train(dataclasses.replace(job, out=tmp_path / "other"))


def test_a_shared_memory_too_small_is_refused_before_the_first_batch(
    photos: Path, store: LabelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_memory(monkeypatch, 16 * 3 * 16 * 16)
    dataset = stored(photos, store)
    sampler = StreamSampler(CropStream(len(dataset), 16, [Phase(4, 2)], 0), 0, 2)
    with pytest.raises(InputError, match="make /dev/shm larger"):
        training_loader(dataset, sampler, 1, pin_memory=False)
    training_loader(dataset, sampler, 0, pin_memory=False)
    with pytest.raises(InputError, match="make /dev/shm larger"):
        evaluation_loader(CenterViews(scan_split(photos, "val"), np.arange(3), 16, 1.0, "bilinear"), 16, 1)
    with pytest.raises(InputError, match=r"^cache: \d+ of 24 [^\n]*/dev/shm has 0 MiB free; make /dev/shm larger"):
        DecodedPhotos(LabelledPhotos(FolderPhotos(photos / "train"), store), range(len(store)), 1)


@pytest.mark.parametrize("training", [True, False])
def test_a_shared_memory_that_others_filled_is_one_line(
    photos: Path, store: LabelStore, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    monkeypatch.setattr(torch.TypedStorage, "_new_shared", full)
    dataset = stored(photos, store)
    sampler = StreamSampler(CropStream(len(dataset), 16, [Phase(4, 2)], 0), 0, 2)
    views = CenterViews(scan_split(photos, "val"), np.arange(3), 16, 1.0, "bilinear")
    loader = training_loader(dataset, sampler, 1, pin_memory=False) if training else evaluation_loader(views, 4, 1)
    with pytest.raises(InputError, match=r"^workers: no room for a batch of 0\.0 MiB in shared memory \([^\n]*--workers$"):
        list(loaded(loader))
