"""The script that kills `ferkd train`: two kills of it, and that it would notice damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import kill_training
import pytest
from photos import write_photos, write_store

from ferkd.cli import main

FLAGS = ["--student", "python:photos:dropping_net", "--epochs", "8", "--batch-size", "12", "--eval-every", "2", "--log-every", "2"]


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(capsys: pytest.CaptureFixture[str]) -> None:
    assert kill_training.main(["--kills", "2", "--seed", "3"]) == 0
    assert "2 kills, 1 runs finished, 0 faults" in capsys.readouterr().out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    write_photos(folder / "data")
    write_store(folder / "data", folder / "labels")
    main(
        [
            "train",
            "--data",
            str(folder / "data"),
            "--labels",
            str(folder / "labels"),
            "--out",
            str(folder / "run"),
            *FLAGS,
            "--workers",
            "0",
        ]
    )
    return folder / "run"


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(bytes(data))


def lines(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        log = run / "log.jsonl"
        log.write_text("".join(change(log.read_text().splitlines(keepends=True))))

    return spoil


def other_accuracy(found: list[str]) -> list[str]:
    return [json.dumps(json.loads(line) | ({"top1": 2.0} if "top1" in line else {})) + "\n" for line in found]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: None, None),
        (lambda run: flip(run / "last.safetensors", -5), "last.safetensors"),
        (lambda run: (run / "left.tmp").touch(), "files"),
        (lines(lambda found: [*found, found[-1]]), "log.jsonl"),
        (lines(lambda found: found[:3] + found[4:]), "log.jsonl"),
        (lines(lambda found: [*found[:-1], found[-1][:-1]]), "log.jsonl: lines"),
        (lines(other_accuracy), "log.jsonl: top1"),
    ],
    ids=["nothing", "a weight", "a file", "a line twice", "a line lost", "a line cut short", "an accuracy"],
)
def test_a_run_that_differs_is_noticed(run: Path, tmp_path: Path, spoil: Callable[[Path], None], says: str | None) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    spoil(copy)
    found = kill_training.differences(copy, run)
    assert any(says in line for line in found) if says else not found


def test_a_damaged_folder_is_noticed(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert not kill_training.damages(copy)
    flip(copy / "checkpoint.pt", 1000)
    assert "checkpoint.pt" in kill_training.damages(copy)[0]
