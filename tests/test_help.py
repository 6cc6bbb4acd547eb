"""Every command's --help ends with an example, and the example works as printed."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shown_commands import run, write_folder

from ferkd.cli import COMMANDS, main

FORMATS = ["convert fkd", "convert ml-dr", "export fkd"]
MADE = {  # what an example writes, so that it is not there before
    "label": "labels", "train": "runs/ferkd", "convert": "labels", "convert fkd": "labels", "convert ml-dr": "labels",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("shown"))


def examples(command: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines below `Example:`, with which the help ends."""
    with contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    shown = capsys.readouterr().out.rpartition("\nExample:\n")[2].splitlines()
    assert shown
    assert all(line.startswith(f"  ferkd {command.split()[0]} ") for line in shown), shown
    return [line.strip() for line in shown]


@pytest.mark.parametrize("command", [*COMMANDS, *FORMATS])
def test_the_example_of_the_help_works_as_printed(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("matplotlib")
    work = tmp_path / "work"
    shutil.copytree(folder, work)
    if command in MADE:
        shutil.rmtree(work / MADE[command])
    monkeypatch.chdir(work)
    for line in examples(command, capsys):
        assert line.startswith(f"ferkd {command}")
        run(line)


def test_an_example_that_is_wrong_does_not_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for line in ("ferkd eval --data photos --weight runs/ferkd", "ferkd inspect label", "ferkd plan --images many"):
        with pytest.raises(AssertionError, match="exit status 2"):
            run(line)


def test_the_overview_loads_no_torch() -> None:
    code = "import sys; from ferkd.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
