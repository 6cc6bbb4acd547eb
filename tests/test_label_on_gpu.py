"""Labelling on a GPU, as far as it can be seen without one: the host waits for it only where it must."""

import contextlib
import dataclasses
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from small_stores import files_of
from tiny_teachers import GREYS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from waits import Waits

from ferkd import label_batches, label_plan, labeling, preprocessing, shards, store_writing
from ferkd.errors import InputError, Stopped
from ferkd.labeling import LabelSettings, label, plan_job
from ferkd.preprocessing import Preprocessing
from ferkd.store import StoreWriter
from ferkd.teacher import answer_logits

META = torch.device("meta")  # a device that is another one, and needs no hardware


@pytest.fixture
def settings(tmp_path):
    """Nine photographs, one of each of eight classes and one more."""
    random = np.random.default_rng(0)
    for number, level in enumerate([*GREYS, GREYS[0]]):
        folder = tmp_path / f"data/train/g{number % 8}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(level + random.normal(0, 30, (20, 24, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return LabelSettings(
        tmp_path / "data", "python:tiny_teachers:permuted", tmp_path / "store", crops=2, classes="folder", skip_preflight=True
    )


# ---- Copies


@contextlib.contextmanager
def imagined_gpu():
    """Within the block there is a GPU, whose tensors hold nothing; yields what waits for it."""
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        yield waits
    preprocessing._scale_and_shift.cache_clear()  # or imagined tensors would be found by others


def test_no_batch_waits_for_a_copy_to_the_gpu(settings):
    classes, how = plan_job(settings).classes, Preprocessing(16)
    with imagined_gpu() as waits:
        pixels = torch.empty(4, 3, 16, 16, dtype=torch.uint8, device="cuda")
        teacher = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8, device="cuda"))
        classes = classes.to(pixels.device)

        def answer():
            return classes.select(answer_logits(teacher, how, pixels))

        assert answer().shape == (4, 8)
        assert waits.found
        waits.found.clear()
        answer()
    assert waits.found == []


def test_the_classes_lie_where_the_teacher_answers(settings, monkeypatch):
    monkeypatch.setattr(label_plan, "choose_device", lambda *_: META)
    job = plan_job(settings)
    assert job.classes.columns.device == next(job.teacher.model.parameters()).device == META
    assert plan_job(dataclasses.replace(settings, classes="teacher")).classes.columns is None


# ---- Which GPU, and the threads beside it


@pytest.mark.parametrize(
    ("device", "rank", "processes", "own"), [(None, 1, 2, "cuda:1"), ("cuda:1", 0, 1, "cuda:1"), (None, 0, 1, "cuda:0")]
)
def test_a_process_works_on_its_own_gpu_from_the_start(settings, monkeypatch, device, rank, processes, own):
    events = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda chosen: events.append(str(chosen)))

    def load(*_):
        events.append("load")
        raise InputError("far enough")

    monkeypatch.setattr(label_plan, "load_teacher", load)
    with pytest.raises(InputError, match="far enough"):
        plan_job(dataclasses.replace(settings, device=device), rank, processes)
    assert events == [own, "load"]


def test_threads_that_decode_beside_a_gpu_compute_alone_as_long_as_labels_are_made(settings, monkeypatch):
    job, seen = plan_job(settings), []

    def lead(*_):
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(torch.get_num_threads).result())

    monkeypatch.setattr(labeling, "_lead", lead)
    monkeypatch.setattr(labeling, "describe", lambda *_: [])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for device in ("cpu", "cuda"):
            monkeypatch.setattr(labeling, "plan_job", lambda *_, device=device: dataclasses.replace(job, device=torch.device(device)))
            label(settings)
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [3, 1]


# ---- From one shard to the next


class AnswersLater(label_batches._Answering):
    """As on a GPU: the answers of the batch shown last are not there yet."""

    def __init__(self, job):
        super().__init__(job)
        self.ahead = 1


@pytest.fixture
def three_shards(settings, monkeypatch):
    """Settings for shards of four, four and one photographs, each in a unit: three, three and one batches."""
    for module in (labeling, shards, store_writing):
        monkeypatch.setattr(module, "UNIT_IMAGES", 4)
    return dataclasses.replace(settings, batch_size=3)


@pytest.fixture
def events(monkeypatch):
    """What happens while labels are made: a photograph is given to a thread, a batch shown, a shard finished; pools of threads are made."""
    seen = []

    def noted(owner, name, event):
        real = getattr(owner, name)

        def seen_and_done(*arguments, **named):
            seen.append(event)
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, seen_and_done)

    noted(label_batches, "ThreadPoolExecutor", "pool")
    noted(ThreadPoolExecutor, "submit", "photo")
    noted(label_batches, "answer_logits", "batch")
    noted(StoreWriter, "finish_shard", "shard")
    return seen


def test_a_gpu_is_given_the_next_shards_first_batch_before_a_shard_is_written(three_shards, events, monkeypatch):
    one_by_one = dataclasses.replace(three_shards, out=three_shards.out.with_name("one by one"), workers=0)
    label(one_by_one, lambda _: None)
    assert events == [*["batch"] * 3, "shard", *["batch"] * 3, "shard", "batch", "shard"]
    monkeypatch.setattr(label_batches, "_Answering", AnswersLater)
    for workers in (0, 2):
        events.clear()
        settings = dataclasses.replace(three_shards, out=three_shards.out.with_name(f"ahead {workers}"), workers=workers)
        label(settings, lambda _: None)
        shown = [event for event in events if event in ("batch", "shard")]
        assert shown == [*["batch"] * 4, "shard", *["batch"] * 3, "shard", "shard"]
        assert files_of(settings.out) == files_of(one_by_one.out)


def test_threads_decode_ahead_from_one_shard_into_the_next(three_shards, events):
    label(dataclasses.replace(three_shards, workers=2), lambda _: None)
    assert events.count("pool") == 1
    assert events[: events.index("shard")].count("photo") == 9


@pytest.mark.parametrize("answered", [2, 3, 4, 6])
def test_broken_off_around_a_shards_end_a_store_comes_out_the_same(three_shards, monkeypatch, answered):
    monkeypatch.setattr(label_batches, "_Answering", AnswersLater)
    whole = dataclasses.replace(three_shards, out=three_shards.out.with_name("whole"))
    label(whole, lambda _: None)
    answer, shown = label_batches.answer_logits, []

    def broken(*arguments):
        shown.append(0)
        if len(shown) > answered:
            raise InputError("broken off")
        return answer(*arguments)

    monkeypatch.setattr(label_batches, "answer_logits", broken)
    with pytest.raises(InputError, match="broken off"):
        label(three_shards, lambda _: None)
    monkeypatch.setattr(label_batches, "answer_logits", answer)
    said = []
    label(three_shards, said.append)
    assert ("4 of 9 photos are labelled already" in said) == (answered >= 4)
    assert files_of(three_shards.out) == files_of(whole.out)


def test_a_stop_asked_for_at_a_shards_end_gives_up_what_was_begun_of_the_next(three_shards, monkeypatch):
    monkeypatch.setattr(label_batches, "_Answering", AnswersLater)
    finish = StoreWriter.finish_shard

    def finish_and_stop(writer, shard):
        finish(writer, shard)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StoreWriter, "finish_shard", finish_and_stop)
    with pytest.raises(Stopped, match="stopped after 8 of 18 crops"):
        label(three_shards, lambda _: None)
    monkeypatch.setattr(StoreWriter, "finish_shard", finish)
    said = []
    label(three_shards, said.append)
    assert "4 of 9 photos are labelled already" in said
