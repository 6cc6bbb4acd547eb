"""What the README shows is what works."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from photos import write_photos, write_store

from ferkd.cli import COMMANDS

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_loop_of_the_readme_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    write_photos(Path("photos"), train=1)
    write_store(Path("photos"), Path("labels"))
    namespace: dict[str, object] = {}
    exec(compile(code[1].replace("224", "64"), "README.md", "exec"), namespace)
    assert isinstance(namespace["loss"], torch.Tensor)
    assert namespace["loss"].item() >= 0.0


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 150
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert link.startswith("https://") or (Path(__file__).parent.parent / link.partition("#")[0]).exists(), link


def test_the_readme_names_every_main_command_and_target() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for command in re.findall(r"^    ferkd (\w+)", README, re.M):
        assert command in COMMANDS
    assert os.access(Path(__file__).parent.parent / ".ci" / "run", os.X_OK)
