"""docs/guide.md is walked: its commands and its Python run in order in an empty folder, and say what the guide shows, numbers apart."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ferkd.cli import main

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs/guide.md").read_text()
NOT_RUN = {
    "make build": "the environment is the one that runs the test",
    ". .venv": "likewise",
}


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block. `sh` and `python` are run, `text` is what the one before it says."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.S | re.M)


def said_by(act: Callable[[], object]) -> str:
    """What is printed, on stdout and stderr, as on a terminal."""
    said = io.StringIO()
    logging.getLogger().handlers.clear()  # main() gives it the stderr of the moment
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        act()
    return said.getvalue()


def run_shell(content: str) -> str:
    said = ""
    for line in content.replace("\\\n", " ").splitlines():
        if any(line.startswith(excluded) for excluded in NOT_RUN):
            continue
        program, *arguments = shlex.split(line, comments=True)
        if program == "ferkd":
            status: object = 0
            try:
                said += said_by(lambda arguments=arguments: main(arguments))
            except SystemExit as end:
                status = end.code
            assert not status, f"{line}: exit status {status}"
        else:
            assert program == "python", line
            subprocess.run([sys.executable, *arguments], check=True)
    return said


def words(line: str) -> list[str]:
    """A line without its numbers and bars."""
    return re.findall(r"[A-Za-z][\w/.'-]*", line)


def assert_shown(shown: str, said: str) -> None:
    """Every line that is shown was said, in this order, with the same words; `...` stands for lines, or for the rest of a line."""
    found = iter([words(line) for line in said.splitlines()])
    for line in shown.splitlines():
        whole, wanted = "..." not in line, words(line.partition("...")[0])
        if wanted:
            assert any(real == wanted if whole else real[: len(wanted)] == wanted for real in found), f"{line!r} was not said:\n{said}"


def walk(text: str) -> int:
    """Runs a page's blocks in the present folder; the number of blocks whose words were compared."""
    said, compared = "", 0
    for language, content in blocks(text):
        if language == "sh":
            said = run_shell(content)
        elif language == "python":
            said = said_by(lambda content=content: exec(compile(content, "guide.md", "exec"), {}))
        elif language == "text":
            assert_shown(content, said)
            compared += 1
    return compared


@pytest.mark.slow
def test_the_guide_works_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    assert walk(GUIDE) >= 8
    for page in re.findall(r"`(\w+\.html)`", GUIDE):
        assert Path(page).stat().st_size > 10_000
    for excluded in NOT_RUN:
        assert re.search(rf"^{re.escape(excluded)}", GUIDE, re.M), f"NOT_RUN names {excluded!r}, which the guide does not"


@pytest.mark.parametrize(
    "wrong",
    [
        "```sh\nferkd plan --images 300 --classes 3 --crop 20\n```\n",
        "```sh\nferkd eval --data photos --weights runs/none\n```\n",
        "```python\nimport ferkd\nferkd.FerKD\n```\n",
        "```sh\nferkd plan --images 300 --classes 3\n```\n\n```text\nteacher   12 hours\n```\n",
        "```sh\npython no_such_script.py\n```\n",
    ],
)
def test_a_page_that_is_wrong_does_not_pass(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, AttributeError, subprocess.CalledProcessError)):
        walk(wrong)


def test_the_flags_of_the_transcript_on_photographs_exist() -> None:
    """It is not run, since its photographs are not here and it takes minutes."""
    shown = re.findall(r"^\$ ferkd (\w+) (.*)$", GUIDE.replace("\\\n", " "), re.M)
    assert len(shown) >= 3
    for command, arguments in shown:

        def help_of(command: str = command) -> None:
            with contextlib.suppress(SystemExit):
                main([command, "--help"])

        known = re.findall(r"--[a-z][a-z0-9-]*", said_by(help_of))
        assert {word for word in shlex.split(arguments) if word.startswith("--")} <= {*known}, arguments
