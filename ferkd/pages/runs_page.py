"""The page of training runs: their curves side by side, what they were shown, how fast they were, and in what they differ."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ferkd.errors import InputError
from ferkd.pages.history import History, number, read_run
from ferkd.pages.page import Markup, escaped, page, table
from ferkd.pages.photos import REGION_LEGEND, sample_photos
from ferkd.regions import RegionPolicy
from ferkd.runs import RunFolder
from ferkd.sources import Photos
from ferkd.store import LabelStore

_COLOURS, _DASHES = 8, 4  # of page.css
_MANY_CHARTS = 12
_ABSENT = "–"


def runs_page(paths: Sequence[Path], store: LabelStore | None = None, photos: Photos | None = None) -> str:
    """The page of runs, as text. With `store` and the `photos` that it labels, some of these too.

    Raises InputError for a folder that is no run, and for a store that none of the runs learnt from. Whatever is damaged or missing
    inside a run is shown as such.
    """
    paths = list({path.resolve(): path for path in paths}.values())
    runs = [read_run(path) for path in paths]
    names = distinct_names([path.resolve() for path in paths])
    groups = alike(runs)
    marks = [f"s{group % _COLOURS} dash{group // _COLOURS % _DASHES}" for group in groups]
    policies = _policies(store, runs, names) if store else {}
    figures: dict[str, Any] = {
        "runs": [
            {"name": name, "mark": mark, "train": run.train.finished(), "evals": run.evals.finished(), "mixed": _is_mixed(run)}
            for run, name, mark in zip(runs, names, marks, strict=True)
        ],
        "policies": [{"name": name, **policy.__dict__} for name, policy in policies.items()],
        "photos": sample_photos(store, photos, next(iter(policies.values())).confidence) if store and photos else [],
    }
    body = f"""
{_results(runs, names, marks)}
{_notes(runs, names)}
{_repeated(runs, names, groups)}
<h2>Learning curves</h2>
{_CONTROLS}
<div class="grid" id="curves"></div>
{_thinned(runs)}
<h2>Regions of the crops that were shown</h2>
{_regions(runs, names)}
<h2>Speed and memory</h2>
<div class="grid" id="speed"></div>
{_settings(runs, names)}
{_PHOTOS if figures["photos"] else ""}
"""
    title = f"Run {names[0]}" if len(runs) == 1 else f"{len(runs)} runs"
    return page(title, Markup(body), figures, ["charts.js", "photos.js", "runs.js"])


_CONTROLS = """
<div class="no-print" data-needs-script hidden>
<fieldset class="legend"><legend>Against</legend>
<label><input type="radio" name="axis" value="step" checked> steps</label>
<label><input type="radio" name="axis" value="crops"> crops</label>
<label><input type="radio" name="axis" value="seconds"> time</label></fieldset>
</div>
<fieldset class="legend" id="legend" data-needs-script hidden><legend>Runs</legend></fieldset>
"""

_PHOTOS = f"""
<h2>Photographs and their crops</h2>
<p>Crops run from the teacher's least to its most confident one, framed by region. Below each the teacher's answer: ✓ the ground truth,
✗ another class.</p>
<p class="no-print" data-needs-script hidden><label>Regions as in the run <select id="policies"></select></label></p>
{REGION_LEGEND}
<div class="photos" id="photos"></div>
"""


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of different absolute paths that tell them apart."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def alike(runs: Sequence[History]) -> list[int]:
    """The number of each run's group: those that differ in nothing but seed, place and machine are one."""
    aside = RunFolder.UNIMPORTANT | {"seed", "data", "labels"}
    groups: dict[str, int] = {}
    found = []
    for place, run in enumerate(runs):
        settings = {name: value for name, value in run.settings.items() if name not in aside and not name.startswith("machine.")}
        key = json.dumps(settings, sort_keys=True) if settings else f"unknown {place}"
        found.append(groups.setdefault(key, len(groups)))
    return found


def duration(seconds: float | None) -> str:
    """Seconds in the unit that people use."""
    if seconds is None:
        return _ABSENT
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"


def _results(runs: Sequence[History], names: Sequence[str], marks: Sequence[str]) -> Markup:
    head = ["run", "status", "student", "labels", "steps", "crops", "time", "top-1 last", "top-1 best", "top-5", "crops/s",
            "waiting for data", "memory, MiB", "store: discarded / calibrated"]  # fmt: skip
    rows = [_result(run, Markup(f'<i class="chip {mark}"></i>{escaped(name)}')) for run, name, mark in zip(runs, names, marks, strict=True)]
    used = [place for place in range(len(head)) if place < 4 or any(row[place] != _ABSENT for row in rows)]
    return table([head[p] for p in used], [[row[p] for p in used] for row in rows], "How the runs ended", names=4, id="results")


def _result(run: History, name: Markup) -> list[object]:
    summary, train, evals = run.summary, run.train.finished(), run.evals.finished()

    def figure(key: str, otherwise: float | None = None) -> float | None:
        found = number(summary.get(key))
        return otherwise if found is None else found

    steps = figure("steps", run.last_step or None)
    crops = figure("crops", max((value for value in (*train["crops"], *evals["crops"]) if value is not None), default=None))
    seconds = figure("seconds", max((value for value in (*train["seconds"], *evals["seconds"]) if value is not None), default=None))
    rates, waits = ([value for value in train[name] if value is not None] for name in ("crops_per_second", "data_wait"))
    regions = summary.get("stored_regions")
    stored = {key: number(value) or 0.0 for key, value in regions.items()} if isinstance(regions, dict) else {}
    total = sum(stored.values())
    student = summary.get("student") or run.config.get("student")
    return [
        name, run.status, student if isinstance(student, str) else _ABSENT, run.method, _whole(steps), _whole(crops), duration(seconds),
        *(_percent(figure(key, otherwise)) for key, otherwise in (
            ("top1", run.last_eval.get("top1")), ("best_top1", run.best_top1), ("top5", run.last_eval.get("top5")))),
        _whole(statistics.median(rates) if rates else None), _percent(statistics.mean(waits) if waits else None, 1),
        _whole(run.largest_memory),
        " / ".join(_percent(stored.get(name, 0.0) / total, 1) for name in ("discarded", "calibrated")) if total else _ABSENT,
    ]  # fmt: skip


def _notes(runs: Sequence[History], names: Sequence[str]) -> Markup:
    """What is wrong with the folders, by run."""
    return Markup(
        "".join(
            f'<p class="note"><b>{escaped(name)}</b>: {escaped("; ".join(run.notes))}</p>\n'
            for run, name in zip(runs, names, strict=True)
            if run.notes
        )
    )


def _repeated(runs: Sequence[History], names: Sequence[str], groups: Sequence[int]) -> Markup:
    """Mean and spread over runs that differ in the seed alone, where there are any."""
    rows = []
    for group in range(max(groups) + 1):
        members = [(run, name) for run, name, of in zip(runs, names, groups, strict=True) if of == group and run.summary]
        top1 = [value for run, _ in members if (value := number(run.summary.get("top1"))) is not None]
        if len(top1) > 1:
            spread = f"{100 * statistics.stdev(top1):.2f}"
            rows.append([", ".join(name for _, name in members), members[0][0].method, len(top1), _percent(statistics.mean(top1)), spread])
    if not rows:
        return Markup()
    return table(["runs", "labels", "n", "top-1 mean", "s.d. (points)"], rows, "Finished runs that differ only in their seed", names=2)


def _thinned(runs: Sequence[History]) -> Markup:
    most = max(max(run.train.lines_a_point, run.evals.lines_a_point) for run in runs)
    return Markup(f"<p><small>A point of a curve is the mean of up to {most:,} lines of the log.</small></p>" if most > 1 else "")


def _is_mixed(run: History) -> bool:
    columns = run.train.finished()
    return any(value for name in ("discarded", "calibrated") for value in columns[name])


def _regions(runs: Sequence[History], names: Sequence[str]) -> Markup:
    kept = [name for run, name in zip(runs, names, strict=True) if not _is_mixed(run) and run.train.columns["step"]]
    text = "<p>A store's discarded crops are never shown; the table above says how many they are.</p>"
    if kept:
        text += f"<p>Every crop was kept in: {escaped(', '.join(kept))}.</p>"
    mixed = sum(map(_is_mixed, runs))
    charts = '<div class="grid small" id="regions"></div>'
    return Markup(text + (f"<details><summary>Charts of {mixed} runs</summary>{charts}</details>" if mixed > _MANY_CHARTS else charts))


def _settings(runs: Sequence[History], names: Sequence[str]) -> Markup:
    """Only what differs, and folded below it what does not."""
    known = [(run.settings, name) for run, name in zip(runs, names, strict=True) if run.settings]
    if not known:
        return Markup()
    keys = list(dict.fromkeys(itertools.chain.from_iterable(settings for settings, _ in known)))
    differing = [key for key in keys if len({settings.get(key, _ABSENT) for settings, _ in known}) > 1]
    same = [[key, _short(known[0][0].get(key, _ABSENT))] for key in keys if key not in differing]
    parts = ""
    if differing:
        cells = [[_short(settings.get(key, _ABSENT)) for settings, _ in known] for key in differing]
        head = [name for _, name in known]
        if len(known) > len(differing):
            head, differing, cells = differing, head, [list(column) for column in zip(*cells, strict=True)]
        rows = [[_breakable(key), *values] for key, values in zip(differing, cells, strict=True)]
        parts = table(["", *map(_breakable, head)], rows, "Settings that differ", names=len(head) + 1, id="differences")
    elif len(known) > 1:
        parts = "<p>The runs have the same settings.</p>"
    which = "Settings" if len(known) == 1 else "Settings that are the same in all runs"
    folded = f"<details><summary>{which} ({len(same)})</summary>{table(['setting', 'value'], same, which, names=2)}</details>"
    return Markup(f"<h2>Settings</h2>\n{parts}{folded}")


def _policies(store: LabelStore, runs: Sequence[History], names: Sequence[str]) -> dict[str, RegionPolicy]:
    """The policies of the runs that learnt from the store, first those that discard or calibrate."""
    found = {
        name: run.policy
        for run, name in zip(runs, names, strict=True)
        if run.policy is not None and run.config.get("store") == store.manifest_sha256
    }
    if not found:
        raise InputError(
            f"{store.source}: none of these runs learnt from this store; give the one that their config.json names, or leave out --labels"
        )
    return dict(sorted(found.items(), key=lambda entry: entry[1].calibrate_below == 0.0 and not entry[1].discards))


def _breakable(name: str) -> Markup:
    """A dotted name that a narrow column may break where its words end."""
    return Markup(re.sub(r"[._/-]", r"\g<0><wbr>", escaped(name)))


def _short(text: str) -> str:
    """A hash by its beginning; everything else as it is, if it is no book."""
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else text[:500]


def _percent(share: float | None, digits: int = 2) -> str:
    return _ABSENT if share is None else f"{share:.{digits}%}"


def _whole(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:,.0f}"
