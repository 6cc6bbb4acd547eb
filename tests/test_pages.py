"""What pages say, that they need nothing else, and that no name or setting becomes HTML or a script."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photos import write_photos, write_store
from run_folders import config_json, log_lines, summary_json, train_line, write_run

from ferkd.cli import main
from ferkd.errors import InputError
from ferkd.inspection import inspect_store
from ferkd.pages.history import Curve, read_run
from ferkd.pages.page import Markup, embedded_json, escaped, page, table, write_page
from ferkd.pages.runs_page import alike, distinct_names, duration, runs_page
from ferkd.pages.store_page import store_page
from ferkd.recipes import TrainConfig
from ferkd.regions import RegionPolicy
from ferkd.sources.folders import FolderPhotos
from ferkd.store import LabelStore

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>&\"é\u2028"


class Reader(HTMLParser):
    """A page as HTML understands it: its elements, the text of its cells, its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag in ("script", "style"):
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            self.texts[self._open[-1]][-1] += data
        elif {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    @property
    def figures(self) -> Any:
        return json.loads(self.texts["script"][0])

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row[0].strip() == name.strip())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "data")


@pytest.fixture(scope="module")
def store(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return write_store(photos, tmp_path_factory.mktemp("labels") / "store", unreadable=5)


def check_stands_alone(text: str) -> Reader:
    """No address of anything else, nothing that HTML or its security policy would run but the page's own script."""
    found = Reader(text)
    assert set(re.findall(r"https?://[^\s\"'<)]*", text)) == {"http://www.w3.org/2000/svg"}
    policy = next(attributes["content"] for tag, attributes in found.tags if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    for kind, own in (("style", found.texts["style"][0]), ("script", found.texts["script"][1])):
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()}'" in policy
    assert [tag for tag, _ in found.tags if tag in ("script", "style", "link", "iframe", "img", "base", "object")] == [
        "style",
        *["script"] * 2,
    ]
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on") or name == "style"]
    return found


def test_the_page_of_a_store_stands_alone_and_says_what_the_table_says(photos: Path, store: LabelStore) -> None:
    inspection = inspect_store(store, RegionPolicy(0.4, 0.6))
    found = check_stands_alone(store_page(store, inspection, FolderPhotos(photos / "train")))
    assert found.row("discarded")[1:3] == [f"{inspection.regions[0]:,}", f"{inspection.regions[0] / 276:.1%}"]
    assert sum(found.figures["counts"]["target"]["crops"]) == 276
    assert found.figures["counts"]["max"]["images"][-1] + sum(found.figures["counts"]["max"]["images"][:-1]) == 23
    photo = found.figures["photos"][0]
    assert photo["jpeg"].startswith("data:image/jpeg;base64,")
    assert len(photo["crops"]) == 8
    assert [crop["max"] for crop in photo["crops"]] == sorted(crop["max"] for crop in photo["crops"])
    assert "1 images could not be read" in store_page(store, inspection)


def test_a_page_is_a_function_of_its_store(photos: Path, store: LabelStore) -> None:
    pages = {store_page(store, inspect_store(store, RegionPolicy()), FolderPhotos(photos / "train")) for _ in range(2)}
    assert len(pages) == 1


def test_hostile_class_and_folder_names_stay_text(photos: Path, tmp_path: Path) -> None:
    store = write_store(photos, tmp_path / "<b>&'x", classes=("blue", "green", "red", HOSTILE, "<i>"), k=5)
    found = check_stands_alone(store_page(store, inspect_store(store, RegionPolicy()), FolderPhotos(photos / "train")))
    assert HOSTILE in {crop["answer"] for photo in found.figures["photos"] for crop in photo["crops"]}
    assert "<h1>Labels of &lt;b&gt;&amp;&#x27;x</h1>" in store_page(store, inspect_store(store, RegionPolicy()))


def test_hostile_runs_stay_text(tmp_path: Path) -> None:
    folder = HOSTILE.replace("/", "∕")
    write_run(tmp_path / folder, store=HOSTILE, summary=summary_json(student=HOSTILE, method=HOSTILE), **{HOSTILE: {HOSTILE: HOSTILE}})
    write_run(tmp_path / "plain", store=None)
    found = check_stands_alone(runs_page([tmp_path / folder, tmp_path / "plain"]))
    assert found.row(folder)[2] == HOSTILE
    assert found.figures["runs"][0]["name"] == folder
    assert f"{HOSTILE}.{HOSTILE}" in {cell for row in found.rows for cell in row}


def test_a_folder_name_that_is_no_utf8_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    name = os.fsdecode(b"run-\xff\xfe")
    write_run(tmp_path / name)
    write_page(tmp_path / "page.html", runs_page([tmp_path / name]))
    assert "run-??" in (tmp_path / "page.html").read_text()


def test_texts_are_escaped_and_markup_is_not() -> None:
    assert escaped('<a href="x">&\'') == "&lt;a href=&quot;x&quot;&gt;&amp;&#x27;"
    made = table(["<b>", "n"], [["&", 1], [Markup("<i>x</i>"), 2]], "a < b")
    assert '<th scope="col" class="name">&lt;b&gt;</th>' in made
    assert '<th scope="row" class="name">&amp;</th><td>1</td>' in made
    assert '<th scope="row" class="name"><i>x</i></th>' in made
    assert "a &lt; b" in made


def test_figures_end_no_script_and_are_json_that_browsers_know() -> None:
    text = embedded_json({"name": HOSTILE + "<!--", "numbers": [float("nan"), float("-inf"), 1.5], "\udcff": "\udcff"})
    assert not set("<>&\u2028") & set(text)
    assert text.isascii()
    assert json.loads(text)["name"] == HOSTILE + "<!--"
    assert json.loads(text)["numbers"] == [None, None, 1.5]
    assert "NaN" not in page("t", Markup("<p>x</p>"), {"a": float("nan")}, ["charts.js"]).split("application/json")[1].split("</script>")[0]


def test_only_a_name_that_says_html_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    log = (run / "log.jsonl").read_bytes()
    for out in (run / "log.jsonl", run):
        with pytest.raises(InputError, match=r"name ends with \.html"):
            write_page(out, "x")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        write_page(tmp_path / "folder.html", "x")
    with pytest.raises(SystemExit):
        main(["report", str(run), "--out", str(run / "log.jsonl")])
    assert "so that no other file is overwritten" in capsys.readouterr().err
    assert (run / "log.jsonl").read_bytes() == log
    write_page(tmp_path / "new" / "page.HTM", "x")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["page.HTM"]


# ---- Runs ----------------------------------------------------------------------------------------------------------------------


def test_finished_runs_side_by_side(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(
            tmp_path / "runs" / f"a{seed}", store="s" * 64, config=TrainConfig(seed=seed), summary=summary_json(top1=0.5 + 0.1 * seed)
        )
    write_run(tmp_path / "runs" / "b", store="s" * 64, config=TrainConfig(lr=0.3, policy=RegionPolicy(0.1, 0.3)))
    text = runs_page([tmp_path / "runs" / name for name in ("a0", "a1", "b")])
    found = check_stands_alone(text)
    assert found.row("a0")[1:10] == ["finished", "resnet18", "FerKD", "100", "1,200", "25.0 s", "50.00%", "66.67%", "90.00%"]
    assert found.row("a0")[10:] == ["535", "12.5%", "512", "10.0% / 30.0%"]
    assert found.row("a0, a1")[1:] == ["FerKD", "2", "55.00%", "7.07"]
    differing = text[text.index("Settings that differ") : text.index("<details>")]
    rows = {row[0]: row[1:] for row in Reader(differing).rows}
    assert rows == {
        "": ["a0", "a1", "b"], "policy.discard_below": ["0.0", "0.0", "0.1"], "policy.calibrate_below": ["0.0", "0.0", "0.3"],
        "lr": ["0.1", "0.1", "0.3"], "seed": ["0", "1", "0"],
    }  # fmt: skip
    assert found.row("momentum") == ["momentum", "0.9"]
    marks = [run["mark"] for run in found.figures["runs"]]
    assert marks[0] == marks[1] != marks[2]


def test_one_run_has_no_differences_and_shows_its_settings(tmp_path: Path) -> None:
    found = check_stands_alone(runs_page([write_run(tmp_path / "only"), tmp_path / "only", tmp_path / "only" / ".." / "only"]))
    assert len(found.figures["runs"]) == 1
    assert found.row("lr") == ["lr", "0.1"]


def test_many_runs_with_few_differences_are_rows_of_the_table(tmp_path: Path) -> None:
    for seed in range(9):
        write_run(tmp_path / str(seed), config=TrainConfig(seed=seed))
    found = check_stands_alone(runs_page([tmp_path / str(seed) for seed in range(9)]))
    assert ["", "seed"] in found.rows
    assert ["8", "8"] in found.rows


def broken(folder: Path, **files: bytes | None) -> Path:
    """A finished run in which files (their names without the dot) are replaced, or missing for None."""
    write_run(folder)
    for name, content in files.items():
        file = folder / {"config": "config.json", "log": "log.jsonl", "summary": "summary.json"}[name]
        file.unlink()
        if content is not None:
            file.write_bytes(content)
    return folder


LOG = "".join(json.dumps(line) + "\n" for line in log_lines(60)).encode()
LOST = (json.dumps(train_line(10)) + "\n" + json.dumps(train_line(20, loss=float("nan"))) + "\n").encode()


BROKEN: dict[str, tuple[dict[str, bytes | None], str, str]] = {
    "unfinished": ({"summary": None, "log": LOG}, "unfinished: step 60 of 100", ""),
    "half a last line": ({"summary": None, "log": LOG[:-30]}, "unfinished: step 50 of 100", "the last line is cut short"),
    "empty log": ({"summary": None, "log": b""}, "unfinished: nothing logged yet", ""),
    "no log": ({"summary": None, "log": None}, "unfinished: nothing logged yet", "log.jsonl is missing: no curves"),
    "half a summary": ({"summary": b'{"top1": 0.', "log": LOG}, "unfinished: step 60 of 100", "summary.json is damaged"),
    "empty summary": ({"summary": b""}, "trained to its end, without a summary", "summary.json is damaged"),
    "lost loss": ({"summary": None, "log": LOST}, "stopped: the loss was no number at step 20", ""),
    "no config": ({"config": None}, "finished", "config.json is missing: its settings are unknown"),
    "bytes": ({"config": b"\x00\xff{"}, "finished", "config.json is damaged"),
    "a list": ({"config": b"[1, 2]"}, "finished", "config.json holds no settings"),
    "deep": ({"config": b"[" * 100_000}, "finished", "config.json is damaged"),
    "zeros": ({"config": None, "summary": None, "log": b"\x00" * 300_000}, "unfinished: nothing logged yet", "1 line is damaged"),
    "strange lines": ({"log": b"[" * 50_000 + b'\n7\n{"kind": "train"}\n' + LOG}, "finished", "3 lines are damaged"),
    "twice": ({"log": LOG + LOG}, "finished", "7 lines are damaged or out of order"),
    "infinite": ({"log": b'{"kind": "train", "step": 1e999}\n{"kind": "x", "step": 1}\n'}, "finished", "2 lines are damaged"),
    "wrong types": ({"log": b'{"kind": "train", "step": 3, "loss": [], "regions": 7, "seconds": {}, "crops": true}\n'}, "finished", ""),
    "huge integer": ({"log": b'{"kind": "train", "step": 3, "loss": 1' + b"0" * 400 + b"}\n"}, "finished", ""),
    "strange summary": ({"summary": b'{"top1": "x", "steps": [], "stored_regions": {"kept": "x"}, "student": {}}'}, "finished", ""),
    "strange config": ({"config": b'{"policy": {"discard_below": 7}, "config": 3, "steps": "many"}'}, "finished", ""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_unfinished_and_damaged_runs_are_shown_as_such(tmp_path: Path, case: str) -> None:
    files, status, says = BROKEN[case]
    text = runs_page([broken(tmp_path / "broken", **files), write_run(tmp_path / "whole")])
    found = check_stands_alone(text)
    assert found.row("broken")[1] == status
    assert found.row("whole")[1] == "finished"
    assert says in text
    assert says or '<p class="note"><b>' not in text


def test_an_unfinished_run_is_told_from_its_log(tmp_path: Path) -> None:
    found = Reader(runs_page([broken(tmp_path / "it", summary=None, log=LOG), write_run(tmp_path / "whole")]))
    assert found.row("it")[1:10] == [
        "unfinished: step 60 of 100",
        "resnet18",
        "hard labels",
        "60",
        "720",
        "15.0 s",
        "33.33%",
        "33.33%",
        "90.00%",
    ]


def test_a_log_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    run = broken(tmp_path / "run", log=None)
    os.mkfifo(run / "log.jsonl")
    assert "log.jsonl cannot be read (is no file)" in runs_page([run])


def test_folders_that_are_no_runs_are_refused(tmp_path: Path, photos: Path, store: LabelStore, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    run = write_run(tmp_path / "run", store="of another store")
    cases = [
        ([tmp_path / "nothing"], "nothing: no such folder"),
        ([tmp_path / "empty"], "holds none of config.json, log.jsonl, summary.json, so it is no run"),
        ([], "give at least one folder"),
        ([run, "--data", photos], "--data and --labels go together"),
        ([run, "--data", photos, "--labels", store.path], "none of these runs learnt from this store"),
    ]
    for arguments, says in cases:
        with pytest.raises(SystemExit) as stop:
            main(["report", *map(str, arguments), "--out", str(tmp_path / "page.html")])
        assert stop.value.code == 2
        error = capsys.readouterr().err.strip()
        assert says in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "page.html").exists()


def test_photographs_in_the_colours_of_a_runs_policy(tmp_path: Path, photos: Path, store: LabelStore) -> None:
    fkd = write_run(tmp_path / "fkd", store=store.manifest_sha256)
    ferkd = write_run(
        tmp_path / "ferkd", store=store.manifest_sha256, config=TrainConfig(policy=RegionPolicy(0.4, 0.6, confidence="target"))
    )
    other = write_run(tmp_path / "other", store="x")
    figures = check_stands_alone(runs_page([fkd, ferkd, other], store, FolderPhotos(photos / "train"))).figures
    assert [policy["name"] for policy in figures["policies"]] == ["ferkd", "fkd"]
    assert figures["policies"][0]["discard_below"] == 0.4
    truth = [crop["target"] for crop in figures["photos"][0]["crops"]]
    assert truth == sorted(truth)


def test_groups_are_runs_that_differ_in_seed_place_and_machine_alone(tmp_path: Path) -> None:
    def grouped(*configs: dict[str, Any]) -> list[int]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return alike([read_run(write_run(folder / str(number), **config)) for number, config in enumerate(configs)])

    base = TrainConfig()
    assert grouped({"config": base}, {"config": dataclasses.replace(base, seed=3, workers=2), "data": "y", "machine": {"threads": 1}}) == [
        0,
        0,
    ]
    assert grouped({"config": base}, {"config": dataclasses.replace(base, lr=0.2)}, {"config": base, "store": "z"}) == [0, 1, 2]


def test_names_are_as_short_as_they_can_be() -> None:
    assert distinct_names([Path("/a/x/run"), Path("/a/y/run"), Path("/b/y/other")]) == ["x/run", "y/run", "y/other"]
    assert distinct_names([Path("/"), Path("/run")]) == ["/", "run"]


def test_times_are_told_in_the_unit_people_use() -> None:
    assert [duration(seconds) for seconds in (None, 3.14, 150, 9000, 400_000)] == ["–", "3.1 s", "2.5 min", "2.5 h", "4.6 days"]


def test_long_logs_are_thinned_and_their_means_kept() -> None:
    curve = Curve(("loss",), points=8)
    for step in range(1, 101):
        curve.add({"step": step, "crops": 2.0 * step, "seconds": None, "loss": float(step)})
    columns = curve.finished()
    assert curve.lines_a_point == 8
    assert columns["step"] == [8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 100]
    assert columns["loss"] == [pytest.approx(np.mean(range(step - 7, step + 1))) for step in range(8, 97, 8)] + [98.5]
    assert columns["seconds"] == [None] * 13


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    run = tmp_path / "long"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config_json(30_000)))
    with open(run / "log.jsonl", "w") as file:
        for step in range(1, 30_001):
            file.write(json.dumps(train_line(step)) + "\n")
    text = runs_page([run])
    assert len(text) < 150_000
    assert "the mean of up to 64 lines" in text
    assert Reader(text).row("long")[4:6] == ["30,000", "360,000"]
