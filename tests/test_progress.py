"""How a run is seen: the log always, one bar or plain lines, and loggers that never stop a run."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import sqlite3
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_runs import state
from test_train import CONFIG

import ferkd.progress
from ferkd.errors import InputError
from ferkd.progress import LOGGERS, Progress, check_loggers, print_line, scalars
from ferkd.runs import RunFolder

NAMES = {
    "train/epoch", "train/crops", "train/lr", "train/loss", "train/top1", "train/crops_per_second", "train/data_wait",
    "train/regions/discarded", "train/regions/calibrated", "train/regions/kept",
}  # fmt: skip
VAL_NAMES = {"val/epoch", "val/crops", "val/seconds", "val/top1", "val/top5", "val/top1_folders", "val/images", "val/best_top1"}


def train_line(step: int, **changes: Any) -> dict[str, Any]:
    regions = {"discarded": 0.0, "calibrated": 0.25, "kept": 0.75}
    line = {"kind": "train", "step": step, "epoch": step / 2, "crops": step * 12, "lr": 0.1, "loss": 3.0 / step, "train_top1": 0.5}
    return {**line, "regions": regions, "crops_per_second": 120.0, "data_wait": 0.125, **changes}


def eval_line(step: int) -> dict[str, Any]:
    line = {"kind": "eval", "step": step, "epoch": step / 2, "crops": step * 12, "seconds": 1.5}
    return {**line, "top1": 0.5, "top5": 0.75, "top1_folders": 0.5, "images": 12, "best_top1": 0.625}


def folder(path: Path, said: list[str] | None = None, **more: Any) -> RunFolder:
    return RunFolder(path, CONFIG, {"student": "tiny", "images": 24}, {}, "auto", print_line if said is None else said.append, **more)


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------------- lines or a bar


def test_every_line_is_logged_and_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    progress = Progress(folder(tmp_path / "run", said), 100, 12, (), CONFIG)
    given = [train_line(3), train_line(6), eval_line(6), train_line(9)]
    for line in given:
        (progress.eval if line["kind"] == "eval" else progress.train)(line)
    progress.close()
    progress.close()
    assert logged(tmp_path / "run") == given
    assert said == [
        "step       3/100  epoch    1.50  loss 1.0000  lr 0.1  120 crops/s  waiting for data 12%  calibrated 25.0%  0.2 min left",
        "step       6/100  epoch    3.00  loss 0.5000  lr 0.1  120 crops/s  waiting for data 12%  calibrated 25.0%  0.2 min left",
        "step       6  val top-1  50.00%  top-5  75.00%  (best 62.50%)",
        "step       9/100  epoch    4.50  loss 0.3333  lr 0.1  120 crops/s  waiting for data 12%  calibrated 25.0%  0.2 min left",
    ]


def test_other_processes_are_silent(tmp_path: Path) -> None:
    said: list[str] = []
    progress = Progress(folder(tmp_path / "run", said, writer=False), 100, 12, ["no such logger"], CONFIG, enabled=False)
    progress.train(train_line(3))
    progress.eval(eval_line(3))
    progress.close()
    assert said == []
    assert not (tmp_path / "run").exists()


SHOW = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_progress import CONFIG, Progress, eval_line, folder, train_line
progress = Progress(folder(Path({run!r})), 100, 12, (), CONFIG)
for step in range(10, 101, 10):
    progress.train(train_line(step))
    if step % 50 == 0:
        progress.eval(eval_line(step))
        print("a result")
progress.close()
print("after the end", file=sys.stderr)
"""


def shown(run: Path, terminal: bool, **environment: str) -> str:
    """What a process writes to stderr while it shows ten lines and two evaluations."""
    script = SHOW.format(tests=str(Path(__file__).parent), run=str(run))
    clean = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "FORCE_COLOR")}
    command, settings = [sys.executable, "-c", script], {**clean, "TERM": "xterm", "COLUMNS": "120", **environment}
    if not terminal:
        done = subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
        assert done.stdout == "a result\n" * 2
        return done.stderr
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=settings, stderr=theirs, stdout=subprocess.PIPE)
    os.close(theirs)
    text = b""
    while True:
        try:
            more = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        text += more
    os.close(ours)
    assert process.stdout is not None
    assert process.stdout.read() == b"a result\n" * 2  # the bar leaves results alone
    assert process.wait() == 0
    return text.decode()


def test_on_a_terminal_there_is_one_bar_and_no_lines(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    text = shown(tmp_path / "run", terminal=True)
    assert "min left" in text
    assert "step 10/100" in text
    assert "step 100/100" in text
    for part in ("epoch 50.00", "loss 0.0300", "120 crops/s", "waiting for data 12%", "lr 0.1", "kept 75.0%  calibrated 25.0%"):
        assert part in text, part
    assert "step     100/100" not in text  # the plain line
    assert text.count("val top-1") == 2  # printed above the bar, to stay
    assert text.rstrip().endswith("after the end")
    assert len(logged(tmp_path / "run")) == 12


@pytest.mark.parametrize("environment", [{"CI": "true"}, {"TERM": "dumb"}], ids=["CI", "dumb"])
def test_on_a_terminal_that_nobody_watches_there_are_lines(tmp_path: Path, environment: dict[str, str]) -> None:
    text = shown(tmp_path / "run", terminal=True, **environment)
    assert text.count("min left") == 10
    assert "\x1b" not in text


def test_in_a_file_there_are_lines(tmp_path: Path) -> None:
    text = shown(tmp_path / "run", terminal=False)
    assert len(text.splitlines()) == 10 + 2 + 1
    assert text.count("min left") == 10
    assert "\x1b" not in text


def test_without_rich_there_are_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(ferkd.progress.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress(folder(tmp_path / "run"), 100, 12, (), CONFIG)
    progress.train(train_line(3))
    assert capsys.readouterr().err.startswith("step       3/100")


def test_a_bar_that_fails_gives_way_to_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def __init__(self, total_steps: int) -> None:
            raise OSError("the terminal went away")

    monkeypatch.setattr(ferkd.progress, "_terminal_with_rich", lambda: True)
    monkeypatch.setattr(ferkd.progress, "_Bar", Broken)
    progress = Progress(folder(tmp_path / "run"), 100, 12, (), CONFIG)
    for step in (3, 6):
        progress.train(train_line(step))
    progress.close()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "warning: no progress bar (the terminal went away); lines from here on"
    assert [line[:13] for line in said[1:]] == ["step       3/", "step       6/"]


def test_lines_that_go_elsewhere_are_never_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ferkd.progress, "_terminal_with_rich", lambda: True)
    said: list[str] = []
    Progress(folder(tmp_path / "run", said), 100, 12, (), CONFIG).train(train_line(3))
    assert len(said) == 1


# -------------------------------------------------------------------------------------------------------------------------- loggers


def test_the_names_of_scalars_are_stable() -> None:
    assert scalars(train_line(3), "train").keys() == NAMES
    assert scalars(eval_line(3), "val").keys() == VAL_NAMES
    assert scalars(train_line(3, skipped=2, note="text", flag=True, nothing=None), "train").keys() == NAMES | {"train/skipped"}


class Recorder:
    """Stands in for a logger."""

    id: str | None = "recorded"
    made: list[Recorder]

    def __init__(self, run: RunFolder, settings: Mapping[str, Any], known: str | None) -> None:
        self.settings, self.known, self.lines, self.failed = settings, known, [], None  # type: ignore[var-annotated]
        self.made.append(self)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self.lines.append((step, dict(scalars)))

    def close(self, failed: bool) -> None:
        self.failed = failed  # type: ignore[assignment]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    Recorder.made = []
    monkeypatch.setitem(LOGGERS, "recorder", Recorder)
    monkeypatch.setitem(sys.modules, "recorder", module := types.ModuleType("recorder"))
    module.__spec__ = ferkd.progress.importlib.util.spec_from_file_location("recorder", __file__)
    return Recorder


def test_loggers_get_the_scalars_and_the_settings(tmp_path: Path, recorder: type[Recorder]) -> None:
    progress = Progress(folder(tmp_path / "run", []), 100, 12, ["recorder", "recorder"], CONFIG)
    progress.train(train_line(3))
    progress.eval(eval_line(3))
    progress.close()
    (made,) = recorder.made
    assert made.lines == [(3, scalars(train_line(3), "train")), (3, scalars(eval_line(3), "val"))]
    assert made.settings["student"] == "tiny"
    assert made.settings["lr"] == CONFIG.lr
    assert made.settings["policy"]["smoothing"] == CONFIG.policy.smoothing
    assert made.failed is False


def test_loggers_know_of_a_run_that_failed(tmp_path: Path, recorder: type[Recorder]) -> None:
    progress = Progress(folder(tmp_path / "run", []), 100, 12, ["recorder"], CONFIG)
    with pytest.raises(RuntimeError), contextlib.closing(progress):
        raise RuntimeError
    assert recorder.made[0].failed is True


def test_a_resumed_run_is_the_same_run_to_its_logger(tmp_path: Path, recorder: type[Recorder]) -> None:
    for expected in (None, None, "recorded"):  # begun, begun again since nothing was saved, resumed
        run = folder(tmp_path / "run", [])
        run.load_checkpoint(torch.device("cpu"))
        Progress(run, 100, 12, ["recorder"], CONFIG).close()
        assert recorder.made[-1].known == expected
        if len(recorder.made) == 2:
            run.save_checkpoint(state(3))


@pytest.mark.parametrize("method", ["log", "close"])
def test_a_logger_that_fails_is_reported_once_and_dropped(
    tmp_path: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*_: Any) -> None:
        raise ConnectionError("the network\nis down")

    said: list[str] = []
    run = folder(tmp_path / "run", said)
    progress = Progress(run, 100, 12, ["recorder"], CONFIG)
    progress.train(train_line(3))
    monkeypatch.setattr(recorder, method, fail)
    for step in (6, 9):
        progress.train(train_line(step))
    progress.close()
    assert [line for line in said if "warning" in line] == [
        "warning: recorder failed (the network is down): going on without it; log.jsonl has everything"
    ]
    assert [line["step"] for line in logged(tmp_path / "run")] == [3, 6, 9]


def test_a_logger_that_cannot_start_stops_a_new_run_but_not_a_resumed_one(
    tmp_path: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ConnectionError("no key")

    run = folder(tmp_path / "run", [])
    Progress(run, 100, 12, ["recorder"], CONFIG).close()
    monkeypatch.setattr(recorder, "__init__", fail)
    with pytest.raises(InputError, match=r"loggers: recorder cannot start \(no key\); mend that, or leave it out of --loggers"):
        Progress(run, 100, 12, ["recorder"], CONFIG)
    run.save_checkpoint(state(3))
    said: list[str] = []
    resumed = folder(tmp_path / "run", said)
    resumed.load_checkpoint(torch.device("cpu"))
    Progress(resumed, 100, 12, ["recorder"], CONFIG).train(train_line(6))
    assert said[0] == "warning: recorder cannot start (no key): going on without it; log.jsonl has everything"
    assert resumed.read_json("loggers.json") == {"recorder": "recorded"}  # for when it can again


def test_what_loggers_print_stays_out_of_the_results(
    tmp_path: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recorder, "log", lambda *_: print("look at me"))
    Progress(folder(tmp_path / "run", []), 100, 12, ["recorder"], CONFIG).train(train_line(3))
    assert capsys.readouterr() == ("", "look at me\n")


def test_an_unknown_or_missing_logger_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="loggers: 'mlflow' is unknown; choose among tensorboard, wandb, trackio"):
        check_loggers(["mlflow"])
    monkeypatch.setitem(LOGGERS, "not_there", Recorder)
    says = r"loggers: not_there is not installed; pip install 'ferkd\[not_there\]', or leave it out of --loggers"
    with pytest.raises(InputError, match=says):
        Progress(folder(tmp_path / "run", []), 100, 12, ["not_there"], CONFIG)
    (tmp_path / "not_there").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=says):  # a folder of that name is no package
        check_loggers(["not_there"])


def test_no_logger_is_loaded_unless_asked_for() -> None:
    code = "import sys, ferkd.progress; print([name for name in ('rich', 'tensorboard', 'wandb', 'trackio') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ------------------------------------------------------------------------------------------------------------ the packages themselves


def interrupted_run(path: Path, logger: str) -> None:
    """Lines of steps 3 to 9, a checkpoint at 6, a kill; then 9 again, otherwise, and 12."""
    run = folder(path, [])
    progress = Progress(run, 12, 12, [logger], CONFIG)
    for step in (3, 6):
        progress.train(train_line(step))
    progress.eval(eval_line(6))
    run.save_checkpoint(state(6))
    progress.train(train_line(9))
    progress.close()
    said: list[str] = []
    run = folder(path, said)
    run.load_checkpoint(torch.device("cpu"))
    progress = Progress(run, 12, 12, [logger], CONFIG)
    for step in (9, 12):
        progress.train(train_line(step, loss=100.0 + step))
    progress.close()
    assert not [line for line in said if "warning" in line]


def test_tensorboard_shows_one_unbroken_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted_run(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == NAMES | VAL_NAMES
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 1.0), (6, 0.5), (9, 109.0), (12, 112.0)]
    assert [event.step for event in events.Scalars("val/top1")] == [6]
    (text,) = events.Tensors("config/text_summary")
    assert b'"student": "tiny"' in text.tensor_proto.string_val[0]


def test_wandb_gets_the_same_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: two parts of one id, which `wandb sync` joins."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    interrupted_run(tmp_path / "run", "wandb")
    run_id = json.loads((tmp_path / "run" / "loggers.json").read_text())["wandb"]
    parts = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(parts) in (1, 2)  # of one second they share a folder
    assert b"train/regions/kept" in parts[-1].read_bytes()


def test_trackio_gets_one_run(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    script = """
import os, sys
os.environ["TRACKIO_DIR"] = sys.argv[2]
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_progress import interrupted_run
interrupted_run(Path(sys.argv[3]), "trackio")
interrupted_run(Path(sys.argv[4]), "trackio")
"""
    # Two folders of the same name are two runs.
    arguments = [str(Path(__file__).parent), str(tmp_path / "trackio"), str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    name = json.loads((tmp_path / "a" / "run" / "loggers.json").read_text())["trackio"]
    assert re.fullmatch("run-[0-9a-f]{6}", name)
    with sqlite3.connect(tmp_path / "trackio" / "ferkd.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert len({row[0] for row in rows}) == 2
    losses = [(step, line["train/loss"]) for run, step, text in rows if run == name and "train/loss" in (line := json.loads(text))]
    assert losses == [(3, 1.0), (6, 0.5), (9, 3.0 / 9), (9, 109.0), (12, 112.0)]
