"""Labelling on several processes: the store of one to the byte, whoever dies, joins or is slow; what goes wrong is said in one line."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import kill_labelling
import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image
from small_stores import files_of
from tiny_teachers import GREYS

from ferkd import cli, devices, label_batches, label_crew, labeling, store_writing
from ferkd.errors import InputError, Stopped, StoreError
from ferkd.label_crew import Crew, Task
from ferkd.labeling import LabelSettings, label, plan_job
from ferkd.store import StoreWriter
from ferkd.store_writing import joined_shards

TESTS = Path(__file__).parent
PHOTOS, CROPS = 30, 4  # photos of each of eight classes: shards of 64, 64, 64 and 48 photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i, level in enumerate(GREYS):
        folder = root / f"train/g{i}"
        folder.mkdir(parents=True)
        for number in range(PHOTOS):
            pixels = np.clip(level + random.normal(0, 30, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    (root / "train/g5/07.png").write_bytes(b"")
    return root


@pytest.fixture
def settings(photos, tmp_path):
    return LabelSettings(photos, "python:tiny_teachers:grey", tmp_path / "store", crops=CROPS, topk=3, batch_size=20, skip_preflight=True)


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory):
    """The files of the store that one process makes."""
    out = tmp_path_factory.mktemp("alone") / "store"
    label(LabelSettings(photos, "python:tiny_teachers:grey", out, crops=CROPS, topk=3, batch_size=20, skip_preflight=True), lambda _: None)
    assert len([name for name in files_of(out) if name.startswith("shards")]) == 4
    return files_of(out)


# ---- Processes as torchrun starts them, without its time to start


def _labeller(environment: dict[str, str], settings: LabelSettings, said: Path, orders: dict) -> None:
    """One process: labels by the command line; `orders` make it slow, let it die before its n-th fsync, or change what it finds."""
    os.environ.update(environment)
    fsync, count, begun = os.fsync, 0, label_batches.label_images

    def dying_fsync(fd: int) -> None:
        nonlocal count
        count += 1
        if count == orders.get("die at fsync"):
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)

    def noted(tasks):
        for task in tasks:
            with open(said.with_suffix(".shards"), "a") as file:
                file.write(f"{task.shard * 64}\n")
            yield task

    def noted_images(job, tasks, on_crops):
        for image in begun(job, noted(tasks), on_crops):
            time.sleep(orders.get("seconds an image", 0.0))
            yield image

    os.fsync = dying_fsync
    labeling.label_images = noted_images
    if "device" in orders:
        devices.device_name = lambda _: orders["device"]
    label_crew.BEAT_S = 0.1
    label_crew.SILENT_S = orders.get("silent", 60.0)
    command = ["label", "--data", str(settings.data), "--teacher", settings.teacher, "--out", str(settings.out), "--crops", str(CROPS)]
    command += ["--topk", "3", "--batch-size", str(settings.batch_size), "--skip-preflight", "--json"]
    with open(said, "w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        cli.main(command)


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["ferkd.labeling", "ferkd.cli", "tiny_teachers", "test_label_crew"])


class Crowd:
    """`world` processes that label together."""

    def __init__(
        self, settings: LabelSettings | list[LabelSettings], world: int, folder: Path, orders: dict[int, dict] | None = None
    ) -> None:
        folder.mkdir(parents=True)
        self.said = [folder / f"{rank}.txt" for rank in range(world)]
        self.entries = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.entries.port),
        }
        common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
        given = settings if isinstance(settings, list) else [settings] * world
        self.processes = [
            PROCESSES.Process(
                target=_labeller,
                args=(common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, given[rank], self.said[rank], (orders or {}).get(rank, {})),
            )
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def end(self, *, terminate: bool = False) -> list[int]:
        """Waits for all; with `terminate` the others get SIGTERM once one has failed, as torchrun does it. Exit codes, by rank."""
        deadline = time.monotonic() + 60
        while any(process.exitcode is None for process in self.processes):
            if terminate and any(process.exitcode for process in self.processes):
                for process in self.processes:
                    process.terminate()
                terminate = False
            assert time.monotonic() < deadline, [said.read_text() for said in self.said]
            time.sleep(0.01)
        return [process.exitcode for process in self.processes]

    def shards(self, rank: int) -> list[int]:
        """The first photos of the shards that a process began."""
        file = self.said[rank].with_suffix(".shards")
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def errors(self) -> list[str]:
        return [line for said in self.said for line in said.read_text().splitlines() if line.startswith("ferkd label: ")]


def test_two_processes_make_the_store_of_one_and_a_slow_one_holds_nobody(settings, alone, tmp_path):
    crowd = Crowd(settings, 2, tmp_path / "said", {1: {"seconds an image": 0.02}})
    assert crowd.end() == [0, 0]
    assert files_of(settings.out) == alone
    assert sorted(crowd.shards(0) + crowd.shards(1)) == [0, 64, 128, 192]
    assert len(crowd.shards(0)) == 3
    assert crowd.said[1].read_text() == ""  # the first alone speaks
    said = crowd.said[0].read_text()
    assert "on " in said.splitlines()[1 if "taking them" in said.splitlines()[0] else 0]
    assert ", 2 processes" in said
    figures = json.loads(said.splitlines()[-1])
    assert (figures["crops"], figures["labelled_crops"], figures["failed"]) == (960, 960, {"g5/07.png": "0 bytes: the file is empty"})
    assert figures["regions"] == {"discarded": 0, "calibrated": 0, "kept": 956}
    assert figures["bytes"] == sum(len(data) for name, data in alone.items() if name.endswith(".bin"))
    assert "  g5/07.png: 0 bytes: the file is empty" in said


@pytest.mark.parametrize(("dying", "moment"), [(0, 5), (1, 2)])
def test_a_killed_process_loses_nothing_and_others_may_go_on(settings, alone, tmp_path, dying, moment):
    """Then three processes go on, of which one is killed too, and one ends it."""
    orders = {rank: {"seconds an image": 0.002} for rank in range(3)}
    first = Crowd(settings, 2, tmp_path / "first", {**orders, dying: {**orders[dying], "die at fsync": moment}})
    exits = first.end(terminate=True)
    assert exits[dying] == -signal.SIGKILL
    assert exits[1 - dying] == 75
    assert len(first.errors()) == 1
    Crowd(settings, 3, tmp_path / "second", {**orders, 2: {**orders[2], "die at fsync": 2}}).end(terminate=True)
    label(settings, lambda _: None)
    assert files_of(settings.out) == alone
    assert Crowd(settings, 2, tmp_path / "third").end() == [0, 0]  # nothing is left to do
    assert files_of(settings.out) == alone


def test_an_error_of_one_process_ends_all_and_is_one_line(settings, photos, tmp_path):
    (tmp_path / "other").mkdir()
    for entry in photos.iterdir():
        (tmp_path / "other" / entry.name).symlink_to(entry)
    cases = [
        (dataclasses.replace(settings, batch_size=16), "another labelling job: batch_size: 16 here, 20 there"),
        (dataclasses.replace(settings, teacher="python:tiny_teachers:vague"), "another labelling job: provenance.teacher.spec"),
        (dataclasses.replace(settings, out=tmp_path / "elsewhere"), "is not the folder that process 0 writes to; every machine must see"),
        (dataclasses.replace(settings, data=tmp_path / "nowhere"), "nowhere: no such folder"),
    ]
    for number, (other, says) in enumerate(cases):
        crowd = Crowd([settings, other], 2, tmp_path / str(number))
        assert sorted(crowd.end()) == [2, 75]
        assert len(crowd.errors()) == 1
        assert says in crowd.errors()[0]
    both = Crowd(dataclasses.replace(settings, data=tmp_path / "nowhere"), 2, tmp_path / "both")
    assert both.end() == [2, 2]
    assert len(both.errors()) == 1


def test_sigterm_to_one_process_stops_all_and_the_same_command_goes_on(settings, alone, tmp_path):
    crowd = Crowd(settings, 2, tmp_path / "said", {rank: {"seconds an image": 0.015} for rank in range(2)})
    while not (crowd.shards(0) and crowd.shards(1)):
        time.sleep(0.01)
    crowd.processes[1].terminate()
    assert crowd.end() == [75, 75]
    assert len(crowd.errors()) == 1
    assert re.search(r"stopped after \d+ of 960 crops; start the same command again", crowd.errors()[0])
    assert Crowd(settings, 2, tmp_path / "again").end() == [0, 0]
    assert files_of(settings.out) == alone


def test_a_process_that_falls_silent_ends_the_job(settings, tmp_path):
    """Killed where nothing tells the others, as with a whole machine."""
    crowd = Crowd(settings, 2, tmp_path / "said", {0: {"silent": 1.0}, 1: {"die at fsync": 2}})
    assert crowd.end() == [2, -signal.SIGKILL]
    assert "torchrun: process 1 has not been heard of for 1 s; what is labelled so far is kept" in crowd.errors()[0]


def test_another_machine_is_noted_in_the_store(settings, alone, tmp_path):
    crowd = Crowd(settings, 2, tmp_path / "said", {1: {"device": "another processor"}})
    assert crowd.end() == [0, 0]
    manifest = json.loads((settings.out / "manifest.json").read_text())
    assert manifest["resumed_with"] == ['provenance.device.name: "another processor"']
    assert 'another process has provenance.device.name: "another processor"' in crowd.said[0].read_text()
    assert files_of(settings.out)["index.bin"] == alone["index.bin"]


def test_a_dry_run_adds_up_the_rates(settings, tmp_path, monkeypatch):
    entries = dist.HashStore()
    crews = [Crew(entries, rank, 2) for rank in (0, 1)]
    added: list[float] = []
    other = threading.Thread(target=lambda: added.append(crews[1].summed(3.0)))
    other.start()
    assert crews[0].summed(4.0) == 7.0
    other.join()
    assert added == [3.0]
    for crew in crews:
        crew.close()


@pytest.mark.slow
def test_the_command_under_torchrun(settings, alone):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ferkd", "label"]
    command += ["--data", settings.data, "--teacher", settings.teacher, "--out", settings.out, "--crops", CROPS, "--topk", 3]
    command += ["--batch-size", 20, "--skip-preflight", "--json"]
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert files_of(settings.out) == alone
    assert json.loads(done.stdout)["crops"] == 960


@pytest.mark.slow
def test_the_script_that_kills_at_random_moments_runs(capsys):
    """20 kills of one process and of two are its work; here it is kept in order."""
    assert kill_labelling.main(["--kills", "1", "--seconds", "0.01"]) == 0
    assert re.fullmatch(r"1 kills, \d+ stores finished, 0 different", capsys.readouterr().out.splitlines()[-1])


# ---- The rules, one by one


def test_alone_the_tasks_come_in_order_until_stopped():
    crew, todo = Crew(), [Task(0, 0, 63), Task(1, 64, 99)]
    turns = crew.turns(todo)
    tasks = next(turns)
    assert next(tasks) == todo[0]
    crew.count_finished()
    assert not crew.all_finished(todo)
    crew.stop.set()
    assert [*tasks, *turns] == []
    assert isinstance(crew.ending("why"), Stopped)
    crew = Crew()
    assert [list(tasks) for tasks in crew.turns(todo)] == [todo]
    assert not crew.all_finished(todo)
    for _ in todo:
        crew.count_finished()
    assert crew.all_finished(todo)


def test_tasks_are_taken_ahead_but_for_the_last():
    entries, todo = dist.HashStore(), [Task(i, 64 * i, 64 * i + 63) for i in range(6)]
    slow, fast = Crew(entries, 0, 2), Crew(entries, 1, 2)
    of_slow, of_fast = slow.turns(todo), fast.turns(todo)
    ahead = next(of_slow)
    assert [next(ahead).shard, next(ahead).shard] == [0, 1]
    assert [task.shard for task in next(of_fast)] == [2, 3, 4]  # with one task left, nobody takes it while at work on another
    assert list(ahead) == []
    assert [task.shard for task in next(of_fast)] == [5]
    assert [*of_slow, *of_fast] == []
    for crew in (slow, fast):
        crew.close()


def test_entries_of_earlier_processes_mean_nothing():
    """torchrun may start processes again beside the entries of those before."""
    entries = dist.HashStore()
    entries.set("process/1", json.dumps({"id": "dead"}))
    entries.set("enlisted/other", json.dumps({"differences": []}))
    leader, enlisted = Crew(entries, 0, 2), []

    def follow() -> None:
        time.sleep(0.3)
        follower = Crew(entries, 1, 2)
        enlisted.append(follower.enlist(lambda job: [f"seen {job}"]))
        follower.close()

    thread = threading.Thread(target=follow)
    thread.start()
    assert leader.lead("job", [(0, 5, 63)]) == ["seen job"]
    leader.begin()
    thread.join()
    assert enlisted == [[Task(0, 5, 63)]]
    leader.close()


def test_a_process_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(label_crew, "START_S", 0.2)
    leader = Crew(dist.HashStore(), 0, 3)
    with pytest.raises(InputError, match="torchrun: process 1 has not come within"):
        leader.lead("job", [])
    leader.close()
    follower = Crew(dist.HashStore(), 1, 2)
    with pytest.raises(InputError, match="torchrun: process 0 has not come within"):
        follower.enlist(lambda _: [])
    follower.close()


def test_a_process_that_outlived_its_job_cannot_write(settings):
    """Its leader is gone, or another job has begun."""
    job = plan_job(settings)
    photos = range(64)
    images = [image for _, image in zip(photos, label_batches.label_images(job, [Task(0, 0, 63)], lambda _: None), strict=True)]
    with StoreWriter(settings.out, job.plan) as holder:
        writer, differences = joined_shards(settings.out, job.plan, holder.token)
        assert differences == []
        writer.write_unit(0, images)
        with pytest.raises(StoreError, match="is not the folder that process 0 writes to"):
            joined_shards(settings.out, job.plan, "another")
    with pytest.raises(StoreError, match="lock: is no longer this job's"):
        writer.finish_shard(0)
    with StoreWriter(settings.out, job.plan), pytest.raises(StoreError, match="lock: is no longer this job's"):
        writer.write_unit(1, images)


def _write_first_unit(settings: LabelSettings, images: list, token: str, ready, go) -> None:
    store_writing.SHARDS = 1
    writer, _ = joined_shards(settings.out, plan_job(settings).plan, token)
    writer.write_unit(0, images)
    ready.set()
    go.wait(60)


def test_two_writers_of_one_shard_are_refused(settings, monkeypatch):
    monkeypatch.setattr(store_writing, "SHARDS", 1)
    job = plan_job(settings)
    images = list(label_batches.label_images(job, [Task(0, 0, 63)], lambda _: None))
    ready, go = PROCESSES.Event(), PROCESSES.Event()
    with StoreWriter(settings.out, job.plan) as holder:
        other = PROCESSES.Process(target=_write_first_unit, args=(settings, images, holder.token, ready, go))
        other.start()
        assert ready.wait(60)
        with pytest.raises(StoreError, match="another process is still at work on this shard"):
            holder.write_unit(0, images)
        go.set()
        other.join()
    with StoreWriter(settings.out, job.plan) as holder:
        assert holder.missing() == [(0, 64, 239)]


def test_more_processes_than_gpus_and_tf32_on_a_cpu_are_refused(settings, monkeypatch):
    with pytest.raises(InputError, match="tf32: the teacher runs on the CPU"):
        plan_job(dataclasses.replace(settings, tf32=True, device="cpu"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InputError, match="3 processes for the 2 GPUs here; lower --nproc-per-node"):
        plan_job(settings, 2, 3)
    with pytest.raises(InputError, match="cuda:1 for 2 processes of this machine; leave --device out"):
        plan_job(dataclasses.replace(settings, device="cuda:1"), 1, 2)


def test_an_error_is_said_once_by_whoever_asks_first(monkeypatch):
    from ferkd.distributed import first_to_say

    entries = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert first_to_say("no torchrun")
    assert first_to_say("no torchrun")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(entries.port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert [first_to_say(text) for text in ("a", "a", "b", "a")] == [True, False, True, False]
    del entries
    with contextlib.redirect_stderr(io.StringIO()):
        assert first_to_say("a")  # nobody to ask any more
