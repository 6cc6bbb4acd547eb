"""Labelling on a GPU, as far as it can be seen without one: the host waits for it only where it must."""

import contextlib
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from tiny_teachers import GREYS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ferkd import label_plan, labeling, preprocessing
from ferkd.errors import InputError
from ferkd.labeling import LabelSettings, label, plan_job
from ferkd.preprocessing import Preprocessing
from ferkd.teacher import answer_logits

META = torch.device("meta")  # a device that is another one, and needs no hardware


@pytest.fixture
def settings(tmp_path):
    """Nine photographs, one of them of each of eight classes and one more."""
    for number, level in enumerate([*GREYS, GREYS[0]]):
        folder = tmp_path / f"data/train/g{number % 8}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 20), level).save(folder / f"{number}.png")
    return LabelSettings(
        tmp_path / "data", "python:tiny_teachers:permuted", tmp_path / "store", crops=2, classes="folder", skip_preflight=True
    )


# ---- Copies


class CopiesToTheGpu(TorchDispatchMode):
    """Lists what is copied from the host to the GPU while the host waits."""

    def __init__(self):
        super().__init__()
        self.waited = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        copied = op is torch.ops.aten._to_copy.default and (args[0].device.type, result.device.type) == ("cpu", "cuda")
        if copied and not kwargs.get("non_blocking"):
            self.waited.append(tuple(args[0].shape))
        return result


@contextlib.contextmanager
def imagined_gpu():
    """Within the block there is a GPU, whose tensors hold nothing; yields what is copied to it."""
    with FakeTensorMode(allow_non_fake_inputs=True), CopiesToTheGpu() as copies:
        yield copies
    preprocessing._scale_and_shift.cache_clear()  # or imagined tensors would be found by others


def test_no_batch_waits_for_a_copy_to_the_gpu(settings):
    classes, how = plan_job(settings).classes, Preprocessing(16)
    with imagined_gpu() as copies:
        pixels = torch.empty(4, 3, 16, 16, dtype=torch.uint8, device="cuda")
        teacher = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8, device="cuda"))
        classes = classes.to(pixels.device)

        def answer():
            return classes.select(answer_logits(teacher, how, pixels))

        assert answer().shape == (4, 8)
        assert copies.waited
        copies.waited.clear()
        answer()
    assert copies.waited == []


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
