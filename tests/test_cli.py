"""The command line: help that teaches, one line of error, the promised exit statuses, JSON for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from photos import write_photos, write_store

from ferkd.cli import COMMANDS, main
from ferkd.errors import StoreError
from ferkd.store import LabelStore

FAST = ["--student", "python:photos:tiny_net", "--epochs", "2", "--batch-size", "12", "--workers", "0", "--single-crop-epochs", "1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "data")


@pytest.fixture(scope="module")
def store(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return write_store(photos, tmp_path_factory.mktemp("labels") / "store")


def run(*arguments: object) -> int:
    """The exit status of `ferkd ARGUMENTS`."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def test_a_format_is_named_first(capsys: pytest.CaptureFixture[str]) -> None:
    for command, formats in (("convert", "fkd, ml-dr"), ("export", "fkd")):
        for wrong in ([command], [command, "tinyvit", "--help"]):
            assert run(*wrong) == 2
            assert error_of(capsys).endswith(f"name the format first: {formats}")


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in COMMANDS)
    assert run() == 2


def test_python_dash_m_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "ferkd", "no-such-command"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "'no-such-command' is no command" in done.stderr
    assert subprocess.run([sys.executable, "-m", "ferkd", "--version"], capture_output=True, text=True).stdout.strip() == "0.1.0"


def test_train_then_eval(photos: Path, store: LabelStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run("train", "--data", photos, "--labels", store.path, "--out", out, *FAST, "--discard-below", "0.4", "--json") == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["method"] == "FerKD"
    assert run("eval", "--data", photos, "--weights", out / "last.safetensors", "--workers", "0", "--json") == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["top1"] == trained["top1"]
    assert evaluated["images"] == 12
    config = json.loads((out / "config.json").read_text())["config"]
    assert config["policy"]["discard_below"] == 0.4


def test_train_prints_a_table(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--data", photos, "--out", tmp_path / "run", *FAST) == 0
    assert "top-1, last" in capsys.readouterr().out


def test_flags_change_a_recipe(photos: Path, tmp_path: Path) -> None:
    assert run("train", "--data", photos, "--out", tmp_path / "run", "--recipe", "small_images", *FAST, "--lr", "0.01") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["lr"], config["epochs"], config["weight_decay"], config["cache"]) == (0.01, 2.0, 5e-4, "decoded")


def test_pages_of_a_store_and_of_a_run(photos: Path, store: LabelStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "pages" / "inspected.html"
    assert run("inspect", store.path, "--thresholds", "quantile", "--discard-below", "0.1", "--data", photos, "--page", page, "--json") == 0
    assert json.loads(capsys.readouterr().out)["written"] == [str(page)]
    assert "are these quantiles of" in page.read_text()
    assert run("train", "--data", photos, "--labels", store.path, "--out", tmp_path / "run", *FAST, "--json") == 0
    trained = json.loads(capsys.readouterr().out)
    out = tmp_path / "report.html"
    assert run("report", tmp_path / "run", "--data", photos, "--labels", store.path, "--out", out) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert f"{trained['top1']:.2%}" in out.read_text()


def test_inspect_counts_and_draws(photos: Path, store: LabelStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = ["--discard-below", "0.5", "--calibrate-below", "0.7", "--confidence", "target"]
    assert run("inspect", store.path, *policy, "--data", photos, "--pictures", tmp_path / "pictures") == 0
    text = capsys.readouterr().out
    assert "288 crops of 24 images" in text
    assert "discarded" in text
    for name in ("confidence.png", "crops.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")
    assert "What other thresholds would do" in text
    assert run("inspect", store.path, *policy, "--json") == 0
    counted = json.loads(capsys.readouterr().out)
    assert sum(counted["regions"].values()) == 288 == sum(counted["band_crops"]) == sum(counted["scale_crops"])
    assert counted["regions"]["discarded"] > 0
    assert counted["regions"]["calibrated"] > 0


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err.strip()
    assert "Traceback" not in text
    return text.splitlines()[-1]


def test_wrong_input_is_one_line_and_status_2(photos: Path, store: LabelStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["inspect", tmp_path / "nothing"], "no such folder; give the folder that ferkd label wrote"),
        (["inspect", store.path, "--discard-below", "0.5", "--calibrate-below", "0.2"], "calibrate_below: 0.2 is below discard_below 0.5"),
        (["inspect", store.path, "--data", photos], "add --pictures FOLDER or --page FILE.html"),
        (["inspect", store.path, "--page", tmp_path / "page.png"], "page.png: a page's name ends with .html"),
        (["inspect", store.path, "--page", "/proc/none/page.html"], "/proc/none: No such file or directory"),
        (["report", tmp_path / "nothing"], "nothing: no such folder; give the --out folders of ferkd train"),
        (["train", "--data", tmp_path / "nothing", "--out", tmp_path / "run", *FAST], "nothing"),
        (["train", "--data", photos, "--out", tmp_path / "run", "--recipe", "imagenet", *FAST], "recipe: 'imagenet' is unknown"),
        (["eval", "--data", photos], "give either --weights FILE"),
        (["eval", "--data", photos, "--weights", tmp_path / "none.safetensors"], "none.safetensors"),
        (["eval", "--data", photos, "--weights", "x", "--input-size", "8"], "--teacher-weights and --input-size go with --teacher"),
        (["eval", "--data", photos, "--weights", "x", "--batch-size", "0"], "batch_size: 0"),
        (["eval", "--data", photos, "--weights", "x", "--workers", "-1"], "workers: -1"),
        (["inspect", store.path, "--pictures", "/proc/none"], "/proc/none: No such file or directory"),
        (["train", "--data", photos, "--out", tmp_path / "run", *FAST, "--student", "python:sys:none"], "has no callable 'none'"),
        (["train", "--data", photos, "--out", tmp_path / "run", *FAST, "--student", "python:builtins:dict"], "takes no num_classes"),
        (
            ["train", "--data", photos, "--out", tmp_path / "run", *FAST, "--student", "python:photos:failing_net"],
            "fails on images of 16 x",
        ),
        (["demo", "--data", photos], "--data and --teacher go together"),
    ]
    for arguments, says in cases:
        assert run(*arguments) == 2, arguments
        assert says in error_of(capsys)


@pytest.mark.parametrize("death", ["is killed by signal: Killed. ", "is killed by signal: Bus error. "])
def test_a_killed_loader_process_is_one_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, death: str
) -> None:
    def lose_worker(job: object) -> None:
        raise RuntimeError(f"DataLoader worker (pid 7) {death}")

    monkeypatch.setattr("ferkd.train.train", lose_worker)
    assert run("train", "--data", photos, "--out", tmp_path / "run", *FAST) == 2
    assert (
        error_of(capsys) == f"ferkd train: workers: DataLoader worker (pid 7) {death}Did memory, or /dev/shm, run out? Use fewer --workers"
    )


def test_a_gpu_out_of_memory_is_one_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_memory(settings: object, *rest: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nIf reserved memory is >> allocated ...")

    monkeypatch.setattr("ferkd.labeling.label_with_figures", fill_memory)
    assert run("label", "--data", photos, "--teacher", "python:photos:colour_teacher", "--out", tmp_path / "labels") == 2
    assert error_of(capsys) == "ferkd label: GPU out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.); lower --batch-size"


def test_other_errors_show_where_they_came_from(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(job: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("ferkd.train.train", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run("train", "--data", photos, "--out", tmp_path / "run", *FAST)


def test_half_of_torchruns_environment_is_refused_in_words(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for model in (["label", "--teacher", "python:photos:tiny_net"], ["train", "--student", "python:photos:tiny_net"]):
        assert run(*model, "--data", photos, "--out", tmp_path / "out") == 2
        assert "WORLD_SIZE: set, but 'RANK' is not; start several processes with torchrun" in error_of(capsys)


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such folder"):
        main(["inspect", str(tmp_path / "nothing"), "--debug"])


def test_unknown_flags_are_refused(store: LabelStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", store.path, "--discard-bellow", "0.1") == 2
    assert "--discard-bellow" in error_of(capsys)
