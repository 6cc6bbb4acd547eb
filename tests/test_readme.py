"""What the README shows is what works: its commands and its Python run as printed, and every flag it names exists."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from photos import write_photos, write_store
from shown_commands import run, write_folder

from ferkd.cli import COMMANDS, main
from ferkd.recipes import RECIPES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

NOT_RUN = {
    "make demo": "sets up an environment of its own; tests/test_demo.py runs what it runs",
    "make test": "is what runs this test",
    "make lint type bench sanitize": "developers' own, and long",
    'pip install --no-build-isolation -e ".[timm,plots]"': "changes the environment that runs this test",
    "python -m bench.convergence.run --work DIR": "takes hours; tests/test_convergence.py runs it on studies of its own",
    "python -m bench.convergence.analyse": "redraws bench/results; tests/test_convergence.py runs it on rows of its own",
    "python setup.py build_ext --inplace": "replaces the extension that is being tested",
    "torchrun --nproc-per-node 8 -m ferkd label ...": "abridged; tests/test_label_crew.py runs torchrun",
    "torchrun --nproc-per-node 8 -m ferkd train ...": "abridged; tests/test_train_distributed.py runs torchrun",
}


def lines() -> list[str]:
    """The README's indented commands, then those within its text, without comments."""
    inline = re.findall(r"`([^`]+)`", re.sub(r"\s*\n\s*", " ", re.sub(r"```.*?```", "", README, flags=re.S)))
    shown = [*re.findall(r"^    (\S.*)$", README.split("## In your own")[0], re.M), *inline]
    commands = [line.split("  #")[0].strip() for line in shown if re.match(r"(ferkd|make|pip|python|torchrun) [^:]", line)]
    return [line for line in commands if " " in line.removeprefix("ferkd ")]  # `ferkd train` alone is a name


def test_the_commands_of_the_readme_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("matplotlib")
    write_folder(tmp_path)
    shutil.rmtree(tmp_path / "labels")
    monkeypatch.chdir(tmp_path)
    shown = lines()
    assert {line.split()[1] for line in shown if line.startswith("ferkd ")} == {*COMMANDS} - {"demo"}
    for line in shown:
        if not any(line.startswith(excluded) for excluded in NOT_RUN):
            run(line)
    assert all(any(line.startswith(excluded) for line in shown) for excluded in NOT_RUN), "NOT_RUN names what the README does not"

    loaded = re.search(r"`(timm\.create_model\(.*?\))`", README)
    assert loaded
    import timm

    assert isinstance(eval(loaded[1], {"timm": timm, "N": 3}), torch.nn.Module)


def test_the_flags_and_recipes_that_the_readme_names_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with contextlib.suppress(SystemExit):
            main([command, "--help"])
    known = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out)) | {"--help"}
    inline = re.findall(r"`(--[^`]+)`", README)
    assert len(inline) > 8
    for words in inline:
        flag, *values = words.split()
        assert flag in known, flag
        assert flag != "--recipe" or values[0] in RECIPES


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
        if not link.startswith("https://"):
            page, _, heading = link.partition("#")
            assert (ROOT / page).exists(), link
            headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.M) if heading else []
            assert not heading or heading in [re.sub(r"[^\w -]", "", words).lower().replace(" ", "-") for words in headings], link


def test_the_targets_that_the_readme_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
