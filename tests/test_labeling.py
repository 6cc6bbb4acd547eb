"""Labelling: a store holds what the teacher says of exactly its crops, whatever interrupts the work."""

import dataclasses
import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_teachers import GREYS

from ferkd import label_batches, label_plan, labeling, store_writing
from ferkd.crops import take_crop
from ferkd.errors import CheckFailed, InputError, Stopped, StoreError
from ferkd.labeling import LabelSettings, label, label_with_figures, plan_job
from ferkd.plan import PlanSettings
from ferkd.sources import read_photo
from ferkd.sources.folders import FolderPhotos
from ferkd.store import LabelStore, StoreWriter
from ferkd.teacher import load_teacher


@pytest.fixture(scope="module")
def greys(tmp_path_factory):
    """Noisy pictures of eight grey levels, 20 to 32 px: 22 a class to train on (176: not a multiple of 64), 8 to validate."""
    root = tmp_path_factory.mktemp("greys")
    random = np.random.default_rng(0)
    for split, count in (("train", 22), ("val", 8)):
        for i, level in enumerate(GREYS):
            folder = root / split / f"g{i}"
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = random.integers(20, 33, 2)
                pixels = np.clip(level + random.normal(0, 30, (height, width, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture
def settings(greys, tmp_path):
    # 7 crops and batches of 20: neither photos nor units of 64 photos end where a batch does.
    return LabelSettings(greys, "python:tiny_teachers:grey", tmp_path / "store", crops=7, topk=3, batch_size=20, skip_preflight=True)


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a store but the lock."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file() and file.name != "lock"}


@pytest.fixture(scope="module")
def uninterrupted(greys, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "store"
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch)
        label(LabelSettings(greys, "python:tiny_teachers:grey", out, crops=7, topk=3, batch_size=20, skip_preflight=True))
    assert len([name for name in contents(out) if name.startswith("shards")]) == 2
    return contents(out)


def small_shards(patch: pytest.MonkeyPatch) -> None:
    """Two shards: 128 photos and 48."""
    patch.setattr(store_writing, "SHARDS", 1)
    patch.setattr(store_writing, "SHARD_BYTES", 128 * 7 * (8 + 3 * 4))


# ---- What is stored


@pytest.mark.parametrize("layout", ["exact", "compact"])
def test_a_label_is_what_the_teacher_says_of_the_stored_crop(settings, layout):
    stored = label(dataclasses.replace(settings, layout=layout))
    teacher = load_teacher(settings.teacher)
    assert (len(stored), stored.crops, stored.k, stored.classes) == (176, 7, 3, 8)
    for image in (0, 63, 64, 100, 175):
        labels = stored.read(image)
        photo = read_photo(FolderPhotos(settings.data / "train"), labels.path)
        assert labels.photo_crc == photo.crc
        assert (labels.height, labels.width) == photo.image.shape[1:]
        assert stored.class_names[labels.target] == labels.path.split("/")[0]
        boxes, flips = labels.boxes(np.arange(7))
        pixels = torch.stack([take_crop(photo.image, box, flip, 16, "bilinear") for box, flip in zip(boxes, flips, strict=True)])
        expected = torch.softmax(teacher.model(teacher.preprocessing.normalise(pixels)), 1)
        ids, probs = stored.unpack(labels.label_words)
        assert (ids[:, 0] == expected.argmax(1).numpy()).all()
        np.testing.assert_allclose(probs[:, 0], expected.amax(1).numpy(), atol=5e-4)
    manifest = stored.manifest
    assert manifest.provenance["teacher"]["weights_sha256"] == teacher.weights_sha256
    assert manifest.provenance["preprocessing"] == teacher.preprocessing.as_dict()
    assert (manifest.temperature, manifest.batch_size, manifest.failed) == (1.0, 20, {})


def test_only_the_folders_classes_can_be_kept(greys, tmp_path):
    for name in ("g6", "g2"):
        shutil.copytree(greys / "train" / name, tmp_path / "data/train" / name)
    spec = "python:tiny_teachers:permuted"
    stored = label(LabelSettings(tmp_path / "data", spec, tmp_path / "store", crops=4, topk=2, classes="folder", skip_preflight=True))
    assert stored.class_names == ("g2", "g6")
    assert dict(stored.folders) == {"g2": 0, "g6": 1}
    _, probs = stored.unpack(stored.read(0).label_words)
    np.testing.assert_allclose(probs.sum(1), 1.0, atol=2e-3)
    every = label(LabelSettings(tmp_path / "data", spec, tmp_path / "every", crops=4, topk=2, skip_preflight=True))
    assert every.classes == 8
    assert dict(every.folders) == {"g2": 7, "g6": 3}


def test_a_limit_is_spread_over_the_sorted_list(settings):
    stored = label(dataclasses.replace(settings, limit=16))
    assert [stored.entry(i).path for i in range(16)] == [f"g{i // 2}/{'00' if i % 2 == 0 else '11'}.png" for i in range(16)]


def test_every_photo_is_decoded_once(settings, monkeypatch):
    read = []
    monkeypatch.setattr(label_batches, "read_photo", lambda photos, path, **how: read.append(path) or read_photo(photos, path, **how))
    label(settings)
    assert len(read) == len(set(read)) == 176


@pytest.mark.parametrize(("cores", "threads", "expected"), [(2, 2, 0), (2, 1, 1), (4, 4, 0), (64, 64, 1)])
def test_a_teacher_that_has_all_of_few_cores_shares_them_with_no_thread(monkeypatch, cores, threads, expected):
    monkeypatch.setattr(label_plan.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(label_plan.torch, "get_num_threads", lambda: threads)
    assert label_plan._threads_beside_a_cpu() == expected


def test_the_number_of_threads_changes_nothing(settings, uninterrupted, monkeypatch):
    small_shards(monkeypatch)
    for workers in (0, 3):
        out = settings.out.with_name(f"with{workers}")
        label(dataclasses.replace(settings, workers=workers, out=out))
        assert contents(out) == uninterrupted


def test_the_teacher_always_sees_whole_batches(settings, monkeypatch):
    rows = []
    answer = label_batches.answer_logits

    def counting(model, how, pixels, autocast):
        rows.append(len(pixels))
        return answer(model, how, pixels, autocast)

    monkeypatch.setattr(label_batches, "answer_logits", counting)
    label(settings)
    assert set(rows) == {20}
    assert len(rows) == 23 + 23 + 17  # of shards of 64, 64 and 48 photos


# ---- Interruptions


def _label_and_die(settings: LabelSettings, kill_at: int) -> None:
    """In a process of its own: labels, and kills itself with SIGKILL right before the n-th time that something is made durable."""
    calls = 0
    fsync = os.fsync

    def counting_fsync(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)

    os.fsync = counting_fsync
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch)
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        label(settings)


def test_after_a_kill_at_any_point_the_finished_store_is_the_same_to_the_byte(settings, uninterrupted, monkeypatch):
    small_shards(monkeypatch)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["ferkd.labeling", "tiny_teachers"])
    killed = 0
    for kill_at in range(1, 200):
        if kill_at > 8 and kill_at % 3:
            continue
        out = settings.out.with_name(f"killed{kill_at}")
        process = processes.Process(target=_label_and_die, args=(dataclasses.replace(settings, out=out), kill_at))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        label(dataclasses.replace(settings, out=out), lambda _: None)
        assert contents(out) == uninterrupted, f"killed before fsync {kill_at}"
    assert killed >= 8


def test_a_store_killed_again_and_again_gets_finished(settings, uninterrupted):
    processes = multiprocessing.get_context("forkserver")
    exits = []
    while exits[-1:] != [0] and len(exits) < 30:
        process = processes.Process(target=_label_and_die, args=(settings, 6))
        process.start()
        process.join(60)
        exits.append(process.exitcode)
    assert exits[:2] == [-signal.SIGKILL] * 2
    assert exits[-1] == 0
    assert contents(settings.out) == uninterrupted


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("patience", [1e9, 0.0])
def test_sigterm_or_ctrl_c_stops_and_the_same_command_goes_on(settings, uninterrupted, monkeypatch, patience, asked):
    small_shards(monkeypatch)
    monkeypatch.setattr(labeling, "STOP_SECONDS", patience)  # long: the unit is finished first; none: it is given up
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    sent = []
    answer = label_batches.answer_logits

    def terminate_once(*arguments):
        sent.append(0)
        if len(sent) == 30:  # of 63: in the second unit
            os.kill(os.getpid(), asked)
        return answer(*arguments)

    monkeypatch.setattr(label_batches, "answer_logits", terminate_once)
    with pytest.raises(Stopped, match=r"stopped after \d+ of 1,232 crops; start the same command again"):
        label(settings)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert len(sent) == (30 if patience == 0.0 else 45)
    said = []
    label(settings, said.append)
    assert contents(settings.out) == uninterrupted
    already = 64 if patience == 0.0 else 128
    assert f"{already} of 176 photos are labelled already" in said


def test_a_finished_store_is_left_alone(settings):
    label(settings)
    before, said = contents(settings.out), []
    label(settings, said.append)
    assert contents(settings.out) == before
    assert any("is complete already" in line for line in said)


# ---- Bad input


def test_a_bad_photo_is_recorded_and_stops_nothing(settings, greys, tmp_path, uninterrupted):
    shutil.copytree(greys, tmp_path / "data")
    (tmp_path / "data/train/g0/03.png").write_bytes(b"")
    whole = (greys / "train/g7/21.png").read_bytes()
    (tmp_path / "data/train/g7/21.png").write_bytes(whole[: len(whole) // 2])
    said = []
    stored = label(dataclasses.replace(settings, data=tmp_path / "data"), said.append)
    assert sorted(stored.manifest.failed) == ["g0/03.png", "g7/21.png"]
    assert stored.manifest.failed["g0/03.png"] == "0 bytes: the file is empty"
    assert stored.entry(3).width == 0
    assert "2 photos could not be read and have no labels (manifest.json lists all):" in said
    assert "  g0/03.png: 0 bytes: the file is empty" in said
    good = label(dataclasses.replace(settings, out=tmp_path / "good"), lambda _: None)
    for image in (2, 4, 174):
        assert (stored.read(image).label_words == good.read(image).label_words).all()


def test_an_empty_file_among_thousands_is_named_and_costs_nothing(tmp_path):
    pixels = [Image.fromarray(np.full((20, 20, 3), grey, np.uint8)) for grey in GREYS]
    for i, picture in enumerate(pixels):
        (tmp_path / f"data/train/g{i}").mkdir(parents=True)
        picture.save(first := tmp_path / f"data/train/g{i}/0000.bmp")
        for number in range(1, 300):
            shutil.copy(first, first.with_name(f"{number:04d}.bmp"))
    empty = tmp_path / "data/train/g5/0123.bmp"
    empty.write_bytes(b"")
    said = []
    settings = LabelSettings(tmp_path / "data", "python:tiny_teachers:grey", tmp_path / "store", crops=1, topk=1, skip_preflight=True)
    stored = label(settings, said.append)
    assert len(stored) == 2400
    assert stored.manifest.failed == {"g5/0123.bmp": "0 bytes: the file is empty"}
    assert "1 photos could not be read and have no labels (manifest.json lists all):" in said
    wrong = [i for i in range(2400) if i != 5 * 300 + 123 and stored.unpack(stored.read(i).label_words)[0][0, 0] != i // 300]
    assert not wrong


FOLDERS = ["Größe (klein)", "a b", "a.b.c", "e\u0301te\u0301", "n01440764_fish.v2", "quote'\"s", "ひらがな", "100%"]


def test_class_folders_may_have_any_name(greys, tmp_path):
    for i, name in enumerate(FOLDERS):
        for split in ("train", "val"):
            shutil.copytree(greys / split / f"g{i}", tmp_path / "data" / split / name)
    photo = tmp_path / f"data/train/{FOLDERS[1]}/00.png"
    photo.rename(photo.with_name("photo no. 1 ä.jpeg.PNG"))
    settings = LabelSettings(tmp_path / "data", "python:tiny_teachers:odd_names", tmp_path / "store", crops=2, topk=3)
    stored = label(settings)
    assert dict(stored.folders) == {name: i for i, name in enumerate(FOLDERS)}
    assert stored.class_names == tuple(FOLDERS)
    for name in ("a b/photo no. 1 ä.jpeg.PNG", "e\u0301te\u0301/03.png", "ひらがな/21.png", "100%/00.png"):
        labels = stored.read(stored.paths.index_of(name))
        assert (tmp_path / "data/train" / labels.path).is_file()
        assert stored.class_names[labels.target] == name.split("/")[0]
        assert (stored.unpack(labels.label_words)[0][:, 0] == labels.target).all()
    label(settings)  # and the same command finds nothing to do


def test_a_teacher_that_answers_nan_names_photo_and_crop_and_keeps_what_is_done(settings, monkeypatch, uninterrupted):
    small_shards(monkeypatch)
    answer, calls = label_batches.answer_logits, []

    def sick(*arguments):
        logits = answer(*arguments).clone()
        calls.append(0)
        if len(calls) == 30:
            logits[5] = float("nan")  # crop 29 * 20 + 5 = 585: crop 4 of photo 83
        return logits

    monkeypatch.setattr(label_batches, "answer_logits", sick)
    with pytest.raises(InputError, match=r"train/g3/17.png: the teacher answers NaN to its crop 4 "):
        label(settings)
    label(settings)
    assert contents(settings.out) == uninterrupted


def test_more_answers_than_classes_are_refused_before_anything_runs(settings):
    assert plan_job(dataclasses.replace(settings, topk=None)).plan.k == 5
    with pytest.raises(InputError, match="topk: 9, but there are only 8 classes"):
        label(dataclasses.replace(settings, topk=9))
    assert not settings.out.exists()


def test_other_settings_on_a_store_are_refused(settings):
    label(dataclasses.replace(settings, limit=10))
    for change in ({"crops": 8}, {"seed": 1}, {"teacher": "python:tiny_teachers:vague"}, {"batch_size": 16}):
        with pytest.raises(StoreError, match="another labelling job"):
            label(dataclasses.replace(settings, limit=10, **change))
    with pytest.raises(StoreError):
        label(dataclasses.replace(settings, limit=11))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda photo: photo.rename(photo.with_name("renamed.png")), "is of another dataset"),
        (lambda photo: photo.unlink(), "is of another dataset|another labelling job: images: 175 here, 176 there"),
        (
            lambda photo: shutil.copy(photo, photo.with_name("new.png")),
            "is of another dataset|another labelling job: images: 177 here, 176 there",
        ),
        (lambda photo: Image.open(photo).save(photo, compress_level=0), "begun with other photographs"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_dataset_that_changed_since_is_refused_and_what_was_labelled_stays(settings, tmp_path, monkeypatch, change, says, finished):
    data = shutil.copytree(settings.data, tmp_path / "data")
    settings = dataclasses.replace(settings, data=data)
    if finished:
        label(settings)
    else:
        answer, shown = label_batches.answer_logits, []

        def broken(*arguments):
            shown.append(0)
            if len(shown) == 30:
                raise InputError("broken off")
            return answer(*arguments)

        monkeypatch.setattr(label_batches, "answer_logits", broken)
        with pytest.raises(InputError, match="broken off"):
            label(settings)
    before = contents(settings.out)
    change(data / "train/g0/03.png")
    with pytest.raises(StoreError, match=says):
        label(settings)
    assert contents(settings.out) == before


def test_two_labellers_on_one_store_are_refused(settings):
    job = labeling.plan_job(settings)
    with StoreWriter(settings.out, job.plan), pytest.raises(StoreError, match="another labeller is at work"):
        label(settings)


def test_a_folder_that_cannot_be_written_is_named(settings, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="file"):
        label(dataclasses.replace(settings, out=tmp_path / "file/store"))


def test_a_full_disk_loses_nothing(settings, monkeypatch, uninterrupted):
    small_shards(monkeypatch)
    fsync, calls = os.fsync, []

    def full(fd):
        calls.append(0)
        if len(calls) == 7:
            raise OSError(28, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"the disk is full.*run the same command again"):
        label(settings)
    label(settings)
    assert contents(settings.out) == uninterrupted


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root / "train"), "train: no such folder"),
        (lambda root: (root / "train/empty").mkdir(), "train/empty: class folder without an image"),
        (lambda root: (root / "val/g7").rename(root / "val/other"), r"not in val: 'g7'; only in val: 'other'"),
    ],
)
def test_a_dataset_that_is_none_is_refused(settings, greys, tmp_path, damage, message):
    shutil.copytree(greys, tmp_path / "data")
    damage(tmp_path / "data")
    with pytest.raises(InputError, match=message):
        label(dataclasses.replace(settings, data=tmp_path / "data"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crops": 0}, "crops: 0"),
        ({"topk": 0}, "topk: 0"),
        ({"limit": -1}, "limit: -1"),
        ({"workers": -1}, "workers: -1"),
        ({"layout": "tiny"}, "layout: 'tiny'"),
        ({"autocast": "int8"}, "autocast: 'int8'"),
        ({"device": "gpu"}, "device: 'gpu'"),
        ({"device": "cuda:99"}, "device: cuda:99, but PyTorch sees"),
        ({"scale": (0.5, 0.1)}, "scale"),
        ({"seed": -1}, "seed: -1"),
        ({"teacher": "resnet18"}, "names no model"),
        ({"input_size": 100_000}, "input_size: 100000"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, change, message):
    with pytest.raises(InputError, match=message):
        label(dataclasses.replace(settings, **change))


# ---- What people are told


def test_a_dry_run_estimates_and_writes_nothing(settings):
    said = []
    store, figures = label_with_figures(dataclasses.replace(settings, dry_run=True), said.append)
    assert store is None
    assert figures["dry_run"]
    assert figures["hours"] == figures["crops"] / figures["crops_per_second"] / 3600
    assert figures["label_bytes"] > 0
    assert not settings.out.exists()
    assert said[-1].startswith("dry run: ")
    assert "so 1,232 crops take" in said[-1]
    assert "24.6 kB; nothing was written" in said[-1]


def test_the_estimate_comes_first_and_the_summary_last(settings):
    said = []
    label(settings, said.append)
    assert said[0].startswith("1,232 crops (176 photos x 7) for python:tiny_teachers:grey at 16 px on ")
    assert said[1].startswith("20 bytes a crop (top 3 of 8")
    assert any(line.startswith("measured ") and line.endswith("to come") for line in said)
    assert said[-4].startswith(f"{settings.out}: 1,232 crops of 176 photos")
    assert said[-3].startswith("labelled 1,232 crops in ")
    assert said[-2].startswith("confidence (largest probability): 10% of crops below 0.")
    assert said[-1] == "under the default policy: 0 crops discarded, 0 crops calibrated, 1,232 crops kept"


def test_a_refused_teacher_writes_nothing_unless_told_to(settings):
    wrong = dataclasses.replace(settings, teacher="python:tiny_teachers:permuted", skip_preflight=False)
    with pytest.raises(CheckFailed, match="Likely cause: class order"):
        label(wrong)
    assert not settings.out.exists()
    assert isinstance(label(dataclasses.replace(wrong, skip_preflight=True, limit=8)), LabelStore)


def test_photographs_that_go_away_meanwhile_are_no_failed_ones(settings, monkeypatch):
    read, gone = label_batches.read_photo, settings.data.with_name("gone")
    unplugged = []

    def unplug(photos, path, **options):
        if not unplugged:  # once: a thread that reads ahead may still be about when the folder is back
            unplugged.append(path)
            settings.data.rename(gone)
        return read(photos, path, **options)

    monkeypatch.setattr(label_batches, "read_photo", unplug)
    with pytest.raises(InputError, match="is no longer there as it was; bring it back and start the same command again"):
        label(settings)
    monkeypatch.undo()
    gone.rename(settings.data)
    store = label(settings)
    assert not store.manifest.failed


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_photograph_that_the_machine_cannot_read_is_no_failed_one(settings, monkeypatch, code):
    """Too many open files, a network's hiccup, a ticket that ran out: recorded, they would be failures for good."""

    def refusing(path, mode):
        if path.endswith(("1.png", "1.jpg")):
            raise OSError(code, os.strerror(code))
        return open(path, mode)

    monkeypatch.setattr("ferkd.sources.folders.open", refusing, raising=False)
    with pytest.raises(InputError, match=rf"cannot be read here \({os.strerror(code)}\), which is no fault of the photograph; mend that"):
        label(settings)
    monkeypatch.undo()
    assert not label(settings).manifest.failed


def test_more_classes_than_the_loss_takes_are_not_stored(settings):
    with pytest.raises(InputError, match="topk: 65, but a student can be trained on at most 64 classes a crop"):
        dataclasses.replace(settings, topk=65)
    with pytest.raises(InputError, match="topk: 65"):
        PlanSettings(images=10, classes=100, topk=65)
    dataclasses.replace(settings, topk=64)


def test_a_cpus_threads_are_recorded(settings, tmp_path):
    """Its sums depend on them in their last bits."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            store = label(dataclasses.replace(settings, out=tmp_path / str(threads), limit=8))
            assert store.manifest.provenance["device"]["threads"] == threads
    finally:
        torch.set_num_threads(before)


def test_tf32_may_have_been_set_by_its_newer_name():
    """In a process of its own, since PyTorch does not let the two names be mixed afterwards."""
    code = """
import torch
from ferkd.devices import repeatable
matmul = torch.backends.cuda.matmul
matmul.fp32_precision = "tf32"
for wanted in (False, True):
    with repeatable(wanted):
        print(matmul.fp32_precision, end=" ")
print(matmul.fp32_precision)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["ieee", "tf32", "tf32"], done.stderr


def test_the_preflight_runs_once_for_a_store(settings, monkeypatch):
    said = []
    label(dataclasses.replace(settings, skip_preflight=False, limit=20), said.append)
    assert any(line.startswith("preflight: the teacher recognises ") for line in said)
    monkeypatch.setattr(labeling, "preflight", None)
    label(dataclasses.replace(settings, skip_preflight=False, limit=20), said.append)
    assert "preflight: not repeated, since this store was begun already" in said
