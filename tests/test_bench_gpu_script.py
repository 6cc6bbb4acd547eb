"""bench/gpu.sh, exercised where there is no GPU: it must not be tried for the first time on the machine that has one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("bench", "csrc", "ferkd", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def run(root, *arguments, **variables):
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(root / "out"), "FERKD_EXT": "0"} | variables
    return subprocess.run(["bash", "bench/gpu.sh", *arguments], cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """What the script needs of the repository, with the extensions that are built: it installs into its own folder."""
    tmp_path = tmp_path_factory.mktemp("repository")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.slow
def test_a_dry_run_goes_through_every_stage_and_ends_with_a_table(copied):
    ended = run(copied, "--dry")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    table = ended.stdout[ended.stdout.index("=== bench/gpu.sh all in") :].splitlines()[1:]
    assert [line.split(" (")[0] for line in table] == [
        "build: ok",
        "tests: skipped: no GPU",
        "sanitizer: ok",
        "loss: ok",
        "step: ok",
        "loop: ok",
    ]
    written = sorted(path.name for path in (copied / "out").iterdir())
    assert [name for name in written if name.endswith(".log")] == ["build.log", "loss.log", "step.log", "tests.log"]
    assert [name.split("-")[0] + name[-4:] for name in written if not name.endswith(".log")] == [
        "loop.csv",
        "loss.csv",
        "loss.png",
        "step.csv",
    ]
    assert not list((copied / "ferkd").glob("kernels")), "ferkd.kernels is found through the installation"


@pytest.mark.slow
def test_a_failing_stage_is_named_and_the_others_run(copied):
    (copied / "bench/bench_loss.py").write_text("raise SystemExit('planted')")
    ended = run(copied, "--dry")
    assert ended.returncode == 1
    assert "planted" in ended.stdout
    assert "loss: FAILED with status 1" in ended.stdout
    assert "step: ok" in ended.stdout


def test_a_stage_without_time_is_a_failure(tmp_path):
    ended = run(ROOT, "--dry", LIMIT="7", OUT=str(tmp_path))
    assert ended.returncode == 1
    assert "build: FAILED: no time was left for it" in ended.stdout
    assert "step: FAILED: no time was left for it" in ended.stdout


def test_wrong_use_says_how_it_is_used():
    ended = run(ROOT, "everything")
    assert ended.returncode == 2
    assert "bench/gpu.sh [--dry] [all|tests|loss|step|convergence]" in ended.stderr


def test_the_experiments_need_their_photographs(tmp_path):
    ended = run(ROOT, "--dry", "convergence", OUT=str(tmp_path), FERKD_TEST_DATA=str(tmp_path))
    assert ended.returncode == 2
    assert "imagenette-128.tar.gz" in ended.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path):
    ended = run(ROOT, "loss", OUT=str(tmp_path))
    assert ended.returncode == 2
    assert "sees no GPU" in ended.stderr
    assert not list(tmp_path.iterdir())
