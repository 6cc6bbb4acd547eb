"""The files of a run: whole whatever happens, checked when they are read, and never of another run."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from photos import write_photos
from safetensors.torch import load_file
from test_train import CONFIG, job, lines, same_bits

import ferkd.runs
from ferkd.errors import InputError
from ferkd.runs import CHECKPOINT, PREVIOUS, RunFolder, sealed_step
from ferkd.train import train

CPU = torch.device("cpu")


def folder(path: Path, resume: Any = "auto", said: list[str] | None = None, **more: Any) -> RunFolder:
    config = dataclasses.replace(CONFIG, **more.pop("changes", {}))
    say: Callable[[str], None] = (lambda line: None) if said is None else said.append
    return RunFolder(path, config, {"student": "tiny"}, {}, resume, say, **more)


def state(step: int, size: int = 1000) -> dict[str, Any]:
    return {"step": step, "assessed": step, "model": {"weight": torch.full((size,), float(step)), "count": torch.tensor(step)}, "ema": None}


def is_whole(loaded: dict[str, Any] | None) -> bool:
    return loaded is not None and bool((loaded["model"]["weight"] == loaded["step"]).all())


def temporaries(path: Path) -> list[str]:
    return [name for name in os.listdir(path) if name.endswith(".tmp")]


# ------------------------------------------------------------------------------------------------------------------- two checkpoints


def test_the_newest_and_an_earlier_checkpoint_are_kept(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    assert run.last_good_step() is None
    for step in (3, 6, 9, 9):  # before and after the evaluation of step 9
        run.save_checkpoint(state(step))
        assert run.last_good_step() == step
    assert (sealed_step(run.path / CHECKPOINT), sealed_step(run.path / PREVIOUS)) == (9, 6)
    again = folder(tmp_path / "run")
    assert is_whole(again.load_checkpoint(CPU))
    assert again.resumed_step == 9
    assert temporaries(run.path) == []


def test_a_checkpoint_is_a_file_that_torch_loads(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    run.save_checkpoint(state(3))
    assert torch.equal(torch.load(run.path / CHECKPOINT, weights_only=True)["state"]["model"]["weight"], torch.full((1000,), 3.0))


def test_saving_holds_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    run, big = folder(tmp_path / "run"), state(1, 10_000_000)
    tracemalloc.start()
    run.save_checkpoint(big)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (run.path / CHECKPOINT).stat().st_size > 40_000_000
    assert peak < 4_000_000


# -------------------------------------------------------------------------------------------------------------------------- damage


def _flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    """In the tensors, where torch.load finds none; in the zip archive around them; in the seal."""
    run = folder(tmp_path / "run")
    run.save_checkpoint(state(3))
    path = run.path / CHECKPOINT
    data = path.read_bytes()
    some = random.Random(0).sample(range(len(data) * 8 - 8 * 56), 200)
    for bit in [*some, *range(len(data) * 8 - 8 * 56, len(data) * 8)]:
        path.write_bytes(_flipped(data, bit))
        with pytest.raises(ValueError, match=r"SHA-256|seal"):
            sealed_step(path)
        assert run.last_good_step() is None


def test_torch_alone_takes_a_flipped_bit_for_a_weight(tmp_path: Path) -> None:
    """Why a checkpoint has a seal. When this fails, PyTorch has begun to check its archives, and the seal may go."""
    run = folder(tmp_path / "run")
    run.save_checkpoint(state(3))
    data = (run.path / CHECKPOINT).read_bytes()
    place = data.index(torch.full((1000,), 3.0).numpy().tobytes())
    (run.path / CHECKPOINT).write_bytes(_flipped(data, 8 * place))
    weight = torch.load(run.path / CHECKPOINT, weights_only=True)["state"]["model"]["weight"]
    assert int((weight != 3.0).sum()) == 1


@pytest.mark.parametrize("damage", ["empty", "short", "one byte short", "longer", "one bit", "another file", "torch's own", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_previous_one_and_says_so(tmp_path: Path, damage: str) -> None:
    run = folder(tmp_path / "run")
    for step in (3, 6):
        run.save_checkpoint(state(step))
    path = run.path / CHECKPOINT
    data = path.read_bytes()
    damaged = {
        "empty": b"", "short": data[: len(data) // 2], "one byte short": data[:-1], "longer": data + b"\0",
        "one bit": _flipped(data, 4 * len(data)), "another file": os.urandom(5000), "missing": b"",
    }  # fmt: skip
    if damage == "torch's own":
        torch.save(state(6), path)
    else:
        path.write_bytes(damaged[damage])
    if damage == "missing":  # killed between two renames
        path.unlink()
    said: list[str] = []
    again = folder(tmp_path / "run", said=said)
    loaded = again.load_checkpoint(CPU)
    assert is_whole(loaded)
    assert again.resumed_step == again.last_good_step() == 3
    assert len(said) == 1
    assert "\n" not in said[0]
    assert said[0].startswith(f"warning: {path}: is ")
    assert said[0].endswith("going on from checkpoint-previous.pt, step 3")
    again.save_checkpoint(state(6))  # the damaged one must not take the place of the whole one
    assert (sealed_step(path), sealed_step(run.path / PREVIOUS)) == (6, 3)


def test_two_damaged_checkpoints_are_an_error_that_names_both(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    for step in (3, 6):
        run.save_checkpoint(state(step))
    (run.path / CHECKPOINT).write_bytes(b"")
    (run.path / PREVIOUS).write_bytes(b"no checkpoint" * 100)
    with pytest.raises(
        InputError, match=r"checkpoint\.pt: is no whole .*checkpoint-previous\.pt: is no whole .*start again with another --out"
    ):
        folder(tmp_path / "run").load_checkpoint(CPU)
    assert (run.path / CHECKPOINT).exists()


def test_a_checkpoint_holds_no_code(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    run.save_checkpoint({**state(3), "code": os.getcwd})
    with pytest.raises(InputError, match=r"checkpoint\.pt: is whole, but cannot be read by PyTorch"):
        folder(tmp_path / "run").load_checkpoint(CPU)


def test_a_run_whose_newest_checkpoint_is_damaged_ends_with_the_same_weights(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "data")
    train(job(photos, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    path = tmp_path / "run" / CHECKPOINT
    assert sealed_step(path) > sealed_step(tmp_path / "run" / PREVIOUS)
    path.write_bytes(_flipped(path.read_bytes(), 4 * path.stat().st_size))
    said: list[str] = []
    train(dataclasses.replace(job(photos, tmp_path / "run", resume=True), say=said.append))
    assert "going on from checkpoint-previous.pt" in said[0]
    assert same_bits(*(load_file(tmp_path / run / "last.safetensors") for run in ("run", "whole")))
    assert [line["loss"] for line in lines(tmp_path / "run", "train")] == [line["loss"] for line in lines(tmp_path / "whole", "train")]


# ----------------------------------------------------------------------------------------------- stopped or failing while it is saved


@contextlib.contextmanager
def acting_at(call: int, act: Callable[[], None], after: bool) -> Iterator[list[str]]:
    """Within the block the numbered one of all calls of os.fsync and os.replace does something else, or something more."""
    seen: list[str] = []
    originals = {name: getattr(os, name) for name in ("fsync", "replace")}

    def stand_in(name: str) -> Callable[..., None]:
        def function(*args: Any) -> None:
            seen.append(name)
            if len(seen) == call and not after:
                act()
            originals[name](*args)
            if len(seen) == call and after:
                act()

        return function

    with pytest.MonkeyPatch.context() as patch:
        for name in originals:
            patch.setattr(os, name, stand_in(name))
        yield seen


STEPS_OF_SAVING = ["fsync", "replace", "replace", "fsync"]  # file; newest -> previous, temporary -> newest; folder
PLACES = [(call, after) for call in range(1, len(STEPS_OF_SAVING) + 1) for after in (False, True)]


def _fail(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


def _interrupt() -> None:
    raise KeyboardInterrupt


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("call", "after"), PLACES)
@pytest.mark.parametrize("act", [_fail(errno.EIO), _fail(errno.ENOSPC), _interrupt], ids=["EIO", "ENOSPC", "interrupted"])
def test_a_save_that_fails_at_any_step_leaves_a_whole_checkpoint(tmp_path: Path, call: int, after: bool, act: Callable[[], None]) -> None:
    """Twice in a row at the same step, then once more at every other; and a save after all that is as if nothing had been."""
    run = folder(tmp_path / "run")
    for step in (3, 6):
        run.save_checkpoint(state(step))
    good = 6
    for step, place in ((9, (call, after)), (12, (call, after)), *((15 + i, place) for i, place in enumerate(PLACES))):
        with acting_at(*place[:1], act, place[1]) as seen, contextlib.suppress(InputError, KeyboardInterrupt):
            run.save_checkpoint(state(step))
        assert seen[0] == "fsync"
        assert temporaries(run.path) == []
        now = run.last_good_step()
        assert now is not None
        assert now >= good
        good = now
        assert is_whole(folder(tmp_path / "run").load_checkpoint(CPU))
    run.save_checkpoint(state(100))
    run.save_checkpoint(state(200))
    assert (sealed_step(run.path / CHECKPOINT), sealed_step(run.path / PREVIOUS)) == (200, 100)


def in_child(work: Callable[[], None]) -> int:
    """The child's process id; it ends with status 0 after its work, 1 after an exception."""
    child = os.fork()
    if child:
        return child
    status = 1
    torch.set_num_threads(1)  # the pool's threads are not in a forked child
    with contextlib.suppress(BaseException):
        work()
        status = 0
    os._exit(status)


@pytest.mark.parametrize(("call", "after"), PLACES)
def test_a_process_killed_at_any_step_of_saving_leaves_a_whole_checkpoint(tmp_path: Path, call: int, after: bool) -> None:
    run = folder(tmp_path / "run")
    for step in (3, 6):
        run.save_checkpoint(state(step))
    for step in (9, 12, 15):  # three times in a row, each resumed from what the one before left

        def work(step: int = step) -> None:
            mine = folder(tmp_path / "run")
            mine.load_checkpoint(CPU)
            with acting_at(call, _kill, after):
                mine.save_checkpoint(state(step))

        _, status = os.waitpid(in_child(work), 0)
        assert os.WIFSIGNALED(status) or step > 9  # after a kill between the renames there is no newest one to keep: one call less
        again = folder(tmp_path / "run", said=[])
        assert is_whole(again.load_checkpoint(CPU))
        assert temporaries(run.path) == []


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_killed_at_many_moments_leaves_a_whole_checkpoint(tmp_path: Path, blow: signal.Signals) -> None:
    """Never an older one than was reported as saved; 40 blows on one folder, one after another."""
    chance = random.Random(0)
    saved = 0
    for blow_number in range(40):
        reading, writing = os.pipe()

        def work(writing: int = writing) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            run = folder(tmp_path / "run")
            loaded = run.load_checkpoint(CPU)
            step = loaded["step"] if loaded else 0
            os.write(writing, b"ready\n")
            while True:
                step += 1
                run.save_checkpoint(state(step, 300_000))
                os.write(writing, b"%d\n" % step)

        child = in_child(work)
        os.close(writing)
        text = os.read(reading, 6)
        time.sleep(chance.uniform(0.0, 0.03))
        os.kill(child, blow)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        while more := os.read(reading, 1 << 16):
            text += more
        os.close(reading)
        steps = text.decode().splitlines()[1:]
        saved = int(steps[-1]) if steps else saved
        run = folder(tmp_path / "run")
        if saved or blow_number:
            loaded = run.load_checkpoint(CPU)
            assert loaded is None or is_whole(loaded)
            assert (loaded["step"] if loaded else 0) >= saved
    assert saved > 5  # it is the process that was killed while it saved, not one that never came to it


def test_a_full_disk_is_named_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder(tmp_path / "run")
    for step in (3, 6):
        run.save_checkpoint(state(step))
    before = {name: (run.path / name).read_bytes() for name in os.listdir(run.path)}

    class FullDisk:
        left = 2000

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> int:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(self.file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> FullDisk:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

    with monkeypatch.context() as patch:
        patch.setattr(ferkd.runs, "open", lambda *args: FullDisk(open(*args)), raising=False)  # noqa: SIM115
        for _ in range(2):
            with pytest.raises(
                InputError, match=r"run/checkpoint\.pt: cannot be written \(No space left on device\); free some space and go on"
            ):
                run.save_checkpoint(state(9))
    assert {name: (run.path / name).read_bytes() for name in os.listdir(run.path)} == before
    run.save_checkpoint(state(9))
    assert run.last_good_step() == 9


def test_a_write_that_the_system_cuts_short_is_named(tmp_path: Path) -> None:
    """The kernel itself says no in the middle of the file: a limit on its size."""
    run = folder(tmp_path / "run")
    run.save_checkpoint(state(3))

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with pytest.raises(InputError, match=r"checkpoint\.pt: cannot be written \(File too large\)"):
            run.save_checkpoint(state(6, 1_000_000))
        assert temporaries(run.path) == []

    _, status = os.waitpid(in_child(work), 0)
    assert os.WEXITSTATUS(status) == 0
    assert run.last_good_step() == 3


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    run.save_checkpoint(state(3))
    for name in (".checkpoint.pt.tmp", ".last.safetensors.123.tmp", ".log.jsonl.tmp"):
        (run.path / name).write_bytes(b"half")
    (run.path / ".somebody-else.tmp").write_bytes(b"not ours")
    folder(tmp_path / "run", writer=False)
    assert len(temporaries(run.path)) == 4
    folder(tmp_path / "run")
    assert temporaries(run.path) == [".somebody-else.tmp"]


# ------------------------------------------------------------------------------------------------------------- weights that are lost


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["model", "ema"])
def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path, value: float, part: str) -> None:
    """A step can lose the weights while its own loss, computed before, is still a number."""
    run = folder(tmp_path / "run")
    lost = {**state(9), part: {"layer.weight": torch.tensor([1.0, value, 2.0])}}
    with pytest.raises(InputError, match=r"layer\.weight is not finite at step 9, so not saved; nothing was saved before"):
        run.save_checkpoint(lost)
    run.save_checkpoint(state(6))
    with pytest.raises(InputError, match=r"not saved; the checkpoint of step 6 is safe; lower --lr"):
        run.save_checkpoint(lost)
    assert run.last_good_step() == 6


def test_masks_of_minus_infinity_are_saved(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    run.save_checkpoint({**state(3), "model": {"mask": torch.full((4, 4), -torch.inf).triu(1), "empty": torch.zeros(0)}})
    assert run.last_good_step() == 3


# ------------------------------------------------------------------------------------------------------------------------ resuming


def test_resume_says_whether_a_run_may_and_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run: holds no checkpoint to resume from"):
        folder(tmp_path / "run", "must")
    assert not (tmp_path / "run").exists()
    for start in ("never", False, "auto", True):
        said: list[str] = []
        assert folder(tmp_path / "run", start, said).load_checkpoint(CPU) is None
    run = folder(tmp_path / "run", "never")
    run.save_checkpoint(state(3))
    for refuse in ("never", False):
        with pytest.raises(InputError, match="holds a run already; add --resume"):
            folder(tmp_path / "run", refuse)
    for go_on in ("auto", True, "must"):
        assert is_whole(folder(tmp_path / "run", go_on).load_checkpoint(CPU))
    with pytest.raises(InputError, match="resume: 'perhaps'; choose one of never, auto, must"):
        folder(tmp_path / "run", "perhaps")


def test_a_folder_with_only_the_previous_checkpoint_holds_a_run(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    run.save_checkpoint(state(3))
    (run.path / CHECKPOINT).rename(run.path / PREVIOUS)
    with pytest.raises(InputError, match="holds a run already"):
        folder(tmp_path / "run", "never")
    assert is_whole(folder(tmp_path / "run", "must").load_checkpoint(CPU))


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_weights_without_a_checkpoint_are_not_begun_again(tmp_path: Path, resume: str) -> None:
    """Of a run that is done, whose checkpoints were deleted to save space."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.safetensors").write_bytes(b"weights")
    with pytest.raises(InputError, match="no checkpoint"):
        folder(tmp_path / "run", resume)
    assert os.listdir(tmp_path / "run") == ["best.safetensors"]


def test_what_does_not_change_the_result_may_change(tmp_path: Path) -> None:
    folder(tmp_path / "run").save_checkpoint(state(3))
    said: list[str] = []
    changes = {"workers": 3, "cache": "decoded", "log_every": 7, "eval_every": 9.0}
    assert is_whole(folder(tmp_path / "run", said=said, changes=changes).load_checkpoint(CPU))
    assert said == []
    with pytest.raises(InputError, match=r"was made with lr = 0\.1, this command says 0\.2"):
        folder(tmp_path / "run", changes={"lr": 0.2}).load_checkpoint(CPU)


def test_what_changes_the_last_bits_is_warned_of(tmp_path: Path) -> None:
    folder(tmp_path / "run").save_checkpoint(state(3))
    said: list[str] = []
    run = folder(tmp_path / "run", said=said, changes={"compile": "default"}, world_size=4)
    assert is_whole(run.load_checkpoint(CPU))
    assert [line.split(":")[1] for line in said] == [
        " resuming with compile default what was begun with auto",
        " resuming with world_size 4 what was begun with 1",
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        said.clear()
        folder(tmp_path / "run", said=said).load_checkpoint(CPU)
    finally:
        torch.set_num_threads(threads)
    assert said == [f"warning: resuming with threads {threads + 1} what was begun with {threads}: results may differ in the last bits"]


def test_other_processes_read_and_never_write(tmp_path: Path) -> None:
    said: list[str] = []
    reader = folder(tmp_path / "run", "must", said, writer=False)
    with pytest.raises(InputError, match="holds no checkpoint"):
        reader.load_checkpoint(CPU)
    assert not (tmp_path / "run").exists()
    writer = folder(tmp_path / "run")
    writer.log({"kind": "train", "step": 9})
    for step in (3, 6):
        writer.save_checkpoint(state(step))
    (tmp_path / "run" / CHECKPOINT).write_bytes(b"damaged")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in os.listdir(tmp_path / "run")}
    reader = folder(tmp_path / "run", "auto", said, writer=False, changes={"compile": "default"})
    assert is_whole(reader.load_checkpoint(CPU))
    assert reader.last_good_step() == 3
    reader.log({"kind": "train", "step": 4})
    reader.save_checkpoint(state(9))
    reader.write_json("summary.json", {})
    reader.save_weights("last", torch.nn.Linear(1, 1), ("a",), None, {})  # type: ignore[arg-type]
    assert {name: (tmp_path / "run" / name).read_bytes() for name in os.listdir(tmp_path / "run")} == before
    assert said == []  # the first process says it


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    run.save_checkpoint(state(6))
    for step in (3, 6, 9):
        run.log({"kind": "train", "step": step})
    with open(run.path / "log.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    folder(tmp_path / "run").load_checkpoint(CPU)
    assert [json.loads(text)["step"] for text in (run.path / "log.jsonl").read_text().splitlines()] == [3, 6]
