"""Writing a store: killed at any moment it goes on, alone, and says clearly when it cannot."""

import errno
import fcntl
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from small_stores import files_of, labelled, make_store, small_plan, write_missing

import ferkd.durable
import ferkd.store_writing
from ferkd.crops import DECODER, CropSettings
from ferkd.errors import InputError, StoreError
from ferkd.store import LabelledImage, LabelStore, PathTable, StoreWriter

IMAGES = 150
STEPS = ("open", "write", "fsync", "replace", "unlink", "ftruncate")


@pytest.fixture(autouse=True)
def many_shards(monkeypatch):
    """Shards of one unit, so that a small store has three."""
    monkeypatch.setattr(ferkd.store_writing, "SHARD_BYTES", 1)


@pytest.fixture
def two_unit_shards(monkeypatch):
    """Shards of two units: 150 images are one shard of 128 and one of 22."""
    monkeypatch.setattr(ferkd.store_writing, "SHARDS", 1)
    monkeypatch.setattr(ferkd.store_writing, "SHARD_BYTES", small_plan().image_bytes * 128)


def in_a_child(work):
    """Runs `work` in a forked process; its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def label(out, plan=None):
    with StoreWriter(out, plan or small_plan(IMAGES)) as writer:
        write_missing(writer)


def label_with_kill_at(out, step):
    """Labels, and is killed as kill -9 does just before the given step on the file system; a write is torn in two."""
    taken = 0

    def counted(name, real):
        def call(*arguments, **options):
            nonlocal taken
            taken += 1
            if taken == step:
                if name == "write":
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in STEPS:
        setattr(os, name, counted(name, getattr(os, name)))
    label(out)


# --- Kills


def test_a_kill_before_any_step_on_the_file_system_loses_nothing(tmp_path, two_unit_shards):
    label(tmp_path / "whole")
    wanted = files_of(tmp_path / "whole")
    step, finished = 0, False
    while not finished:
        step += 1
        out = tmp_path / f"killed-{step}"
        status = in_a_child(lambda out=out, step=step: label_with_kill_at(out, step))
        assert os.WIFSIGNALED(status) or status == 0
        finished = status == 0
        label(out)
        assert files_of(out) == wanted, f"killed before step {step}"
    assert step > 60  # or the steps were not counted


def test_kills_one_after_the_other_lose_nothing(tmp_path, two_unit_shards):
    label(tmp_path / "whole")
    rng = random.Random(0)
    for attempt in range(5):
        out = tmp_path / f"killed-{attempt}"
        for _ in range(6):
            in_a_child(lambda out=out: label_with_kill_at(out, rng.randint(1, 30)))
            rng.random()
        label(out)
        assert files_of(out) == files_of(tmp_path / "whole")


def test_a_kill_at_a_random_time_loses_nothing(tmp_path):
    label(tmp_path / "whole")
    rng = random.Random(1)
    killed = 0
    for attempt in range(12):
        out = tmp_path / f"killed-{attempt}"
        pid = os.fork()
        if pid == 0:
            label(out)
            os._exit(0)
        time.sleep(rng.uniform(0.0, 0.08))
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        label(out)
        assert files_of(out) == files_of(tmp_path / "whole")
    assert killed


def test_only_the_unit_that_was_being_written_is_lost(tmp_path, two_unit_shards):
    plan = small_plan(IMAGES)
    with StoreWriter(tmp_path, plan) as writer:
        assert writer.missing() == [(0, 0, 127), (1, 128, 149)]
        writer.write_unit(0, [labelled(plan, i) for i in range(64)])
        assert writer.missing() == [(0, 64, 127), (1, 128, 149)]
    with open(tmp_path / "shards/shard-00000.part", "ab") as part:
        part.write(b"half a unit")
    with StoreWriter(tmp_path, plan) as writer:
        assert writer.missing() == [(0, 64, 127), (1, 128, 149)]
        writer.write_unit(1, [labelled(plan, i) for i in range(128, 150)])
    with StoreWriter(tmp_path, plan) as writer:  # a shard whose units are all there is finished on opening
        assert writer.missing() == [(0, 64, 127)]
        write_missing(writer).check_integrity()


def test_a_unit_damaged_on_disk_is_labelled_again(tmp_path, two_unit_shards):
    plan = small_plan(IMAGES)
    with StoreWriter(tmp_path / "a", plan) as writer:
        writer.write_unit(0, [labelled(plan, i) for i in range(64)])
    part = tmp_path / "a/shards/shard-00000.part"
    damaged = bytearray(part.read_bytes())
    damaged[500] ^= 4
    part.write_bytes(damaged)
    with StoreWriter(tmp_path / "a", plan) as writer:
        assert writer.missing()[0] == (0, 0, 127)
        write_missing(writer)
    label(tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_whole_shard_damaged_before_the_store_is_finished_is_found(tmp_path):
    plan = small_plan(IMAGES)
    with StoreWriter(tmp_path, plan) as writer:
        writer.write_unit(0, [labelled(plan, i) for i in range(64)])
        writer.finish_shard(0)
    shard = bytearray((tmp_path / "shards/shard-00000.bin").read_bytes())
    shard[1000] ^= 1
    (tmp_path / "shards/shard-00000.bin").write_bytes(shard)
    with StoreWriter(tmp_path, plan) as writer:
        store = write_missing(writer)
    with pytest.raises(StoreError, match=r"shard-00000.bin: its SHA-256 is not what the manifest says \(1 images"):
        store.check_integrity()


def test_shards_may_be_written_in_any_order_and_interleaved(tmp_path, two_unit_shards):
    plan = small_plan(IMAGES)
    with StoreWriter(tmp_path / "a", plan) as writer:
        writer.write_unit(1, [labelled(plan, i) for i in range(128, 150)])
        writer.write_unit(0, [labelled(plan, i) for i in range(64)])
        writer.finish_shard(1)
        write_missing(writer)
    label(tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


# --- A finished store


def test_labelling_into_a_finished_store_has_nothing_to_do(tmp_path):
    label(tmp_path)
    before = files_of(tmp_path)
    with StoreWriter(tmp_path, small_plan(IMAGES)) as writer:
        assert writer.finished
        assert writer.missing() == []
        assert len(writer.finish()) == IMAGES
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: os.truncate(file, 10)])
def test_a_missing_or_short_shard_of_a_finished_store_is_labelled_again(tmp_path, damage):
    label(tmp_path)
    before = files_of(tmp_path)
    damage(tmp_path / "shards/shard-00001.bin")
    with StoreWriter(tmp_path, small_plan(IMAGES)) as writer:
        assert writer.missing() == [(1, 64, 127)]
        with pytest.raises(StoreError, match="labelling was not finished"):
            LabelStore(tmp_path)
        write_missing(writer)
    assert files_of(tmp_path) == before


def test_rebuilding_a_shard_may_be_killed_too(tmp_path):
    label(tmp_path / "whole")
    wanted = files_of(tmp_path / "whole")
    for step in range(1, 60, 3):
        out = tmp_path / f"killed-{step}"
        label(out)
        (out / "shards/shard-00001.bin").unlink()
        in_a_child(lambda out=out, step=step: label_with_kill_at(out, step))
        label(out)
        assert files_of(out) == wanted, f"killed before step {step}"


def test_an_unfinished_store_is_not_opened(tmp_path):
    with StoreWriter(tmp_path, small_plan(IMAGES)), pytest.raises(StoreError, match="run the same ferkd label command again to finish it"):
        LabelStore(tmp_path)


# --- Another job


OTHER_JOBS = [
    ({"crops": 5}, "crops: 5 here, 4 there"),
    ({"k": 2}, "k: 2 here, 3 there"),
    ({"batch_size": 64}, "batch_size: 64 here, 32 there"),
    ({"box_codec": "replayed"}, 'box_codec: "replayed" here, "stored" there'),
    ({"label_codec": "packed"}, 'label_codec: "packed" here, "half" there'),
    ({"crop_settings": CropSettings(seed=2)}, r"crop_settings\.seed: 2 here, 1 there"),
    ({"class_names": [*"abcdefghij"]}, "class_names"),
    ({"folders": {"c0": 1}}, "folders"),
    ({"targets": np.zeros(IMAGES, np.int64)}, r"another dataset \(targets differ\)"),
    ({"paths": PathTable.from_paths(f"other/{i:03d}" for i in range(IMAGES))}, r"another dataset \(paths differ\)"),
    ({"provenance": {**small_plan().provenance, "teacher": "another"}}, r'provenance\.teacher: "another" here, "none" there'),
]


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(("change", "says"), OTHER_JOBS)
def test_a_store_of_another_job_is_left_alone(tmp_path, change, says, finished):
    if finished:
        label(tmp_path)
    else:
        StoreWriter(tmp_path, small_plan(IMAGES)).close()
    before = files_of(tmp_path)
    with pytest.raises(StoreError, match=says):
        StoreWriter(tmp_path, small_plan(IMAGES, **change))
    assert files_of(tmp_path) == before


def test_other_hardware_or_software_warns_and_is_noted(tmp_path):
    plan = small_plan(IMAGES)
    with StoreWriter(tmp_path, plan) as writer:
        writer.write_unit(0, [labelled(plan, i) for i in range(64)])
    other = {**plan.provenance, "device": "a gpu", "software": {"torch": "3.0"}, "decoder": {**DECODER, "version": "99"}}
    changed = small_plan(IMAGES, provenance=other)
    with pytest.warns(UserWarning, match=r"other hardware or software .*a gpu"):
        StoreWriter(tmp_path, changed).close()
    with pytest.warns(UserWarning, match=r"other hardware or software .*a gpu"):
        writer = StoreWriter(tmp_path, changed)
    assert writer.missing()[0] == (1, 64, 127)
    store = write_missing(writer)
    assert store.manifest.resumed_with == (
        'provenance.decoder.version: "99"',
        'provenance.device: "a gpu"',
        'provenance.software.torch: "3.0"',
    )
    assert store.manifest.provenance["device"] == "a cpu"


def test_a_shard_rebuilt_on_other_hardware_is_noted(tmp_path):
    label(tmp_path)
    (tmp_path / "shards/shard-00001.bin").unlink()
    plan = small_plan(IMAGES, provenance={**small_plan().provenance, "device": "a gpu"})
    with pytest.warns(UserWarning, match=r"other hardware or software .*a gpu"):
        writer = StoreWriter(tmp_path, plan)
    assert write_missing(writer).manifest.resumed_with == ('provenance.device: "a gpu"',)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_text("a photo")
    with pytest.raises(StoreError, match=r"holds 'holiday\.jpg' and is not a store"):
        StoreWriter(tmp_path, small_plan())
    assert files_of(tmp_path) == {"holiday.jpg": b"a photo"}
    with pytest.raises(StoreError, match="is a file"):
        StoreWriter(tmp_path / "holiday.jpg", small_plan())


def test_a_damaged_job_file_is_named(tmp_path):
    StoreWriter(tmp_path, small_plan()).close()
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(StoreError, match=r"job\.json: is no JSON"):
        StoreWriter(tmp_path, small_plan())


# --- Two labellers


def test_a_second_labeller_is_refused_and_may_go_on_later(tmp_path):
    first = StoreWriter(tmp_path, small_plan(IMAGES))
    with pytest.raises(StoreError, match=rf"another labeller is at work on it \(process {os.getpid()} on {socket.gethostname()}\)"):
        StoreWriter(tmp_path, small_plan(IMAGES))
    assert in_a_child(lambda: label(tmp_path)) != 0
    assert first.missing() == [(0, 0, 63), (1, 64, 127), (2, 128, 149)]
    first.close()
    label(tmp_path)


def test_the_lock_of_a_killed_labeller_is_free_though_its_workers_live_on(tmp_path):
    reader, writer_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        writer = StoreWriter(tmp_path, small_plan(IMAGES))
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        os.write(writer_end, str(worker).encode())
        time.sleep(60)
        del writer
        os._exit(0)
    worker = int(os.read(reader, 20))
    try:
        time.sleep(0.05)  # the worker lets go of the lock in its first moment
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        label(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reader)
        os.close(writer_end)


def test_a_fresh_lock_of_another_machine_is_respected_and_an_old_one_is_not(tmp_path):
    StoreWriter(tmp_path, small_plan(IMAGES)).close()
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    with pytest.raises(StoreError, match=r"process 7 on elsewhere was at work on it \d+ s ago.* start again in \d+ s"):
        StoreWriter(tmp_path, small_plan(IMAGES))
    assert json.loads(lock.read_text())["host"] == "elsewhere"
    os.utime(lock, (time.time() - 100,) * 2)
    label(tmp_path)


@pytest.fixture
def no_locks(monkeypatch):
    """A file system such as Lustre without `-o flock`, or CIFS, which cannot sync folders either."""
    real = os.fsync

    def no_lock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def no_folders(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(fd)

    monkeypatch.setattr(fcntl, "flock", no_lock)
    monkeypatch.setattr(fcntl, "lockf", no_lock)
    monkeypatch.setattr(os, "fsync", no_folders)


def test_without_locks_a_running_labeller_is_respected_and_a_dead_one_is_not(tmp_path, no_locks):
    label(tmp_path / "whole")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        StoreWriter(tmp_path / "store", small_plan(IMAGES)).close()
        lock = tmp_path / "store/lock"
        lock.write_text(json.dumps({"host": socket.gethostname(), "pid": child.pid, "job": "another"}))
        with pytest.raises(StoreError, match=rf"process {child.pid} on {socket.gethostname()} was at work on it \d+ s ago"):
            StoreWriter(tmp_path / "store", small_plan(IMAGES))
    finally:
        child.kill()
        child.wait()
    label(tmp_path / "store")
    assert files_of(tmp_path / "store") == files_of(tmp_path / "whole")


def test_of_two_that_began_at_once_without_locks_one_goes_on(tmp_path, no_locks):
    """Neither saw the other; the lock has the second one's token."""
    first, second = (StoreWriter(tmp_path, small_plan(IMAGES)) for _ in range(2))
    images = [labelled(first.plan, image) for image in range(64)]
    with pytest.raises(StoreError, match="is no longer this job's"):
        first.write_unit(0, images)
    first.close()
    write_missing(second)
    assert len(LabelStore(tmp_path)) == IMAGES


def test_a_labeller_whose_lock_was_taken_over_writes_nothing_and_leaves_the_lock(tmp_path):
    """It was suspended for so long that another machine took it for dead."""
    writer = StoreWriter(tmp_path, small_plan(IMAGES))
    (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 7, "job": "another"}))
    with pytest.raises(StoreError, match="another job has begun"):
        writer.write_unit(0, [labelled(writer.plan, image) for image in range(64)])
    writer.close()
    assert json.loads((tmp_path / "lock").read_text())["job"] == "another"
    assert not list((tmp_path / "shards").glob("*.rows"))


def test_images_are_never_written_in_the_place_of_others(tmp_path, two_unit_shards):
    """What is missing was asked for, and another process wrote a unit before this one opened the shard."""
    writer = StoreWriter(tmp_path, small_plan(IMAGES))
    images = [labelled(writer.plan, image) for image in range(64)]
    writer.write_unit(0, images, 0)
    with pytest.raises(StoreError, match="has the images before 64, and was thought to have those before 0"):
        writer.write_unit(0, images, 0)
    writer.close()


def test_a_labeller_keeps_its_lock_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(ferkd.durable, "_HEARTBEAT_S", 0.01)
    with StoreWriter(tmp_path, small_plan(IMAGES)):
        os.utime(tmp_path / "lock", (0, 0))
        deadline = time.time() + 5
        while os.stat(tmp_path / "lock").st_mtime < 1 and time.time() < deadline:
            time.sleep(0.01)
        assert time.time() - os.stat(tmp_path / "lock").st_mtime < 5


# --- A disk that refuses


@pytest.mark.parametrize(
    ("code", "says"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "make the folder writable"), (errno.EIO, "cannot be written")]
)
def test_a_disk_that_refuses_at_any_write_loses_nothing(tmp_path, monkeypatch, code, says):
    label(tmp_path / "whole")
    wanted = files_of(tmp_path / "whole")
    real_write, real_fsync = os.write, os.fsync
    said = []
    for refused in range(1, 40, 3):
        out = tmp_path / f"refused-{refused}"
        taken = 0

        def refuse(real, *arguments, refused=refused):
            nonlocal taken
            taken += 1
            if taken == refused:
                if real is real_write:
                    real_write(arguments[0], bytes(arguments[1])[:7])
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        monkeypatch.setattr(os, "write", lambda *a, refuse=refuse: refuse(real_write, *a))
        monkeypatch.setattr(os, "fsync", lambda *a, refuse=refuse: refuse(real_fsync, *a))
        try:
            label(out)
        except StoreError as error:
            said.append(str(error))
        monkeypatch.setattr(os, "write", real_write)
        monkeypatch.setattr(os, "fsync", real_fsync)
        label(out)
        assert files_of(out) == wanted
    assert len(said) > 8
    for text in said:
        assert says in text
        assert f"{tmp_path}/refused-" in text
        assert "What was labelled so far is safe" in text


def test_a_unit_may_be_written_again_after_the_disk_was_full(tmp_path, monkeypatch):
    plan = small_plan(IMAGES)
    with StoreWriter(tmp_path / "a", plan) as writer:
        real = os.fsync

        def full(fd):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"shard-00000\.part: the disk is full \([\d,]+ bytes free\)"):
            writer.write_unit(0, [labelled(plan, i) for i in range(64)])
        monkeypatch.setattr(os, "fsync", real)
        assert writer.missing()[0] == (0, 0, 63)
        write_missing(writer)
    label(tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /proc")
def test_a_folder_that_cannot_be_made_is_named():
    with pytest.raises(StoreError, match="/proc/nothing"):
        StoreWriter("/proc/nothing/store", small_plan())


# --- Wrong use


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"k": 11}, "k: 11 of 10 classes"),
        ({"crops": 0}, "crops: 0"),
        ({"targets": np.array([0, 1])}, r"targets: int64 \(2,\)"),
        ({"targets": np.full(IMAGES, 10)}, "targets: 10 to 10; class ids run from 0 to 9"),
        ({"targets": np.full(IMAGES, 0.5)}, "targets: float64"),
        ({"provenance": {"when": object()}}, "provenance: cannot be written as JSON"),
        ({"label_codec": "dense"}, "codec: 'dense'"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change, says):
    with pytest.raises(InputError, match=says):
        small_plan(IMAGES, **change)


def test_wrong_units_are_refused_and_change_nothing(tmp_path):
    plan = small_plan(IMAGES)
    good = [labelled(plan, i) for i in range(64)]
    image = good[0]
    wrong = [
        (good[:63], "images: 63; the next unit of shard 0 has 64"),
        ([LabelledImage(300, 200, 0, None, image.label_words), *good[1:]], "image 0: box_words must be uint64"),
        ([LabelledImage(300, 200, 0, image.box_words, image.label_words[:2]), *good[1:]], "image 0: label_words must be uint32"),
        ([LabelledImage(0, 200, 0, image.box_words, image.label_words), *good[1:]], "image 0: 0 x 200 pixels"),
        ([LabelledImage(40000, 200, 0, image.box_words, image.label_words), *good[1:]], "image 0: 40000 x 200 pixels"),
    ]
    with StoreWriter(tmp_path, plan) as writer:
        for images, says in wrong:
            with pytest.raises(InputError, match=says):
                writer.write_unit(0, images)
        with pytest.raises(InputError, match="shard: 3 is not missing"):
            writer.write_unit(3, good)
        with pytest.raises(InputError, match="shard: 0 lacks images 0 to 63"):
            writer.finish_shard(0)
        with pytest.raises(InputError, match="3 of 3 shards are not labelled yet"):
            writer.finish()
        assert writer.missing() == [(0, 0, 63), (1, 64, 127), (2, 128, 149)]


def test_the_same_job_gives_the_same_bytes_in_another_process(tmp_path):
    label(tmp_path / "here")
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "import ferkd.store_writing; ferkd.store_writing.SHARD_BYTES = 1\n"
        "from small_stores import make_store, small_plan; make_store(sys.argv[1], small_plan(150))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there"), str(Path(__file__).parent)], check=True)
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")


def test_a_store_is_made_without_warnings(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = make_store(tmp_path, small_plan(images=3))
        store.records(store.read(0).label_words)
