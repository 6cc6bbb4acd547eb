"""The experiments' harness on made-up photographs: a study end to end, stops and kills, derived stores, tables."""

import dataclasses
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from photos import write_photos, write_store
from scipy import stats
from torch import nn

from bench.convergence import analyse, datasets, models, run, settings, studies, tables, why
from bench.convergence.datasets import Images, prepare
from bench.convergence.paired import holm, paired_difference
from bench.convergence.results import CURVE_COLUMNS, RUN_COLUMNS, append_rows, curves_file, read_rows, runs_file
from bench.convergence.settings import FKD, SMOOTH, Arm, Recipe, Study, Teacher, ferkd
from bench.convergence.stores import Labelling, Labels, derive
from ferkd.errors import StoreError
from ferkd.inspection import inspect_store

PHOTOS = Images("photos")


def renamed_photos(data, out):
    """write_photos with names that are unique in a split, as the experiments' sources have."""
    for path in sorted(write_photos(out, train=10, val=4).glob("*/*/*.png")):
        path.rename(path.with_name(f"{path.parent.name}{path.name}"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.SOURCES, "photos", renamed_photos)
    monkeypatch.setitem(settings.TEACHERS, "colours", Teacher("python:photos:colour_teacher", flags=("--skip-preflight",)))
    return run.Place(tmp_path / "work", tmp_path, tmp_path / "results")


def labels_of(images, min_scale=0.35, **more):
    return Labels(Labelling("colours", PHOTOS, crops=6, min_scale=0.08, topk=3), images, crops=4, min_scale=min_scale, k=2, **more)


def tiny_study(images=PHOTOS, evaluations=1):
    recipe = Recipe(
        "python:photos:tiny_net", steps=6, lr=0.1, batch_size=8, crops_per_image=2, image_size=16, amp="none", evaluations=evaluations
    )
    return Study(
        "tiny",
        (
            Arm(SMOOTH, recipe, images, 0.35),
            Arm(FKD, recipe, images, 0.35, labels_of(images)),
            Arm(ferkd("target", 0.2, 0.6, mix="selfmix"), recipe, images, 0.35, labels_of(images)),
        ),
        seeds=(0,),
    )


def names(data, split="train"):
    """Image name -> class folder."""
    found = {path.name: path.parent.name for path in (data / split).glob("*/*")}
    assert len(found) == sum(1 for _ in (data / split).glob("*/*"))
    return found


# ---- The data --------------------------------------------------------------------------------------------------------------------


def test_wrong_ground_truth_is_of_the_share_asked_for_in_every_class_and_the_same_every_time(place, tmp_path):
    clean = names(prepare(PHOTOS, place.work, place.data))
    data = prepare(Images("photos", wrong=0.4), place.work, place.data)
    told = names(data)
    assert told.keys() == clean.keys()
    for folder in ("blue", "green", "red"):
        assert sum(told[name] != folder for name in clean if clean[name] == folder) == 4
    assert names(prepare(Images("photos", wrong=0.4), tmp_path / "again", place.data)) == told
    assert names(data, "val") == names(place.work / "data" / "photos", "val"), "val stays true"


def test_tuning_sees_a_tenth_of_train_and_never_val(place):
    images = Images("photos", wrong=0.4)
    whole = names(prepare(images, place.work, place.data))
    tuning = prepare(dataclasses.replace(images, held_out=True), place.work, place.data)
    train, held_out = names(tuning), names(tuning, "val")
    assert {**train, **held_out} == whole, "as wrong as the rest"
    assert not train.keys() & held_out.keys()
    assert len(held_out) == 3


def test_fewer_images_are_a_subset_with_the_same_ground_truth(place):
    whole = names(prepare(Images("photos", wrong=0.4), place.work, place.data))
    half = names(prepare(Images("photos", wrong=0.4, share=0.5), place.work, place.data))
    assert len(half) == 15
    assert half.items() <= whole.items()


# ---- The stores ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["half", "packed"])
def test_a_derived_store_says_of_each_image_what_the_teacher_said_whatever_its_folder(place, tmp_path, codec):
    clean = prepare(PHOTOS, place.work, place.data)
    wrong = Images("photos", wrong=0.4, share=0.5)
    data = prepare(wrong, place.work, place.data)
    labelled = write_store(clean, tmp_path / "labelled", crops=12, k=3)
    labels = Labels(Labelling("colours", PHOTOS, 12, 0.08), wrong, crops=4, min_scale=0.35, k=2, codec=codec)
    derived = derive(labels, labelled, data, tmp_path / "derived")
    derived.check_integrity()
    assert (len(derived), derived.crops, derived.k, derived.label_codec) == (15, 4, 2, codec)
    number_of = {Path(path).name: number for number, path in enumerate(labelled.paths)}
    truth = names(data)
    for image in range(len(derived)):
        ours, name = derived.read(image), Path(derived.paths[image]).name
        theirs = labelled.read(number_of[name])
        assert derived.class_names[ours.target] == truth[name]
        assert ours.photo_crc == theirs.photo_crc
        boxes, flips = theirs.boxes(np.arange(12))
        large = np.flatnonzero(boxes[:, 2] * boxes[:, 3] >= 0.35 * theirs.width * theirs.height)
        chosen = np.resize(large, 4)
        assert (ours.boxes(np.arange(4))[0] == boxes[chosen]).all()
        assert (ours.boxes(np.arange(4))[1] == flips[chosen]).all()
        for found, wanted in zip(derived.unpack(ours.label_words), labelled.unpack(theirs.label_words[chosen]), strict=True):
            np.testing.assert_allclose(found, wanted[:, :2], atol=0 if codec == "half" else 0.01)


def test_a_store_that_was_derived_in_part_is_gone_on_with_and_is_the_same(place, tmp_path, monkeypatch):
    data = prepare(PHOTOS, place.work, place.data)
    labelled = write_store(data, tmp_path / "labelled", crops=12, k=3)
    labels = labels_of(PHOTOS)
    whole = derive(labels, labelled, data, tmp_path / "whole")
    monkeypatch.setattr("bench.convergence.stores.StoreWriter.finish_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        derive(labels, labelled, data, tmp_path / "killed")
    monkeypatch.undo()
    assert derive(labels, labelled, data, tmp_path / "killed").manifest_sha256 == whole.manifest_sha256


def test_images_without_labels_or_without_a_large_crop_are_refused_by_name(place, tmp_path):
    data = prepare(PHOTOS, place.work, place.data)
    labelled = write_store(data, tmp_path / "labelled", crops=12, k=3)
    with pytest.raises(StoreError, match="no crop of at least"):
        derive(labels_of(PHOTOS, min_scale=0.9999), labelled, data, tmp_path / "large")
    shutil.copytree(data, tmp_path / "more")
    (tmp_path / "more/train/blue/stranger.png").write_bytes(b"")
    with pytest.raises(StoreError, match=r"no labels of 1 images.*stranger.png"):
        derive(labels_of(PHOTOS), labelled, tmp_path / "more", tmp_path / "stranger")
    twins = write_store(write_photos(tmp_path / "twins"), tmp_path / "labelled twins")
    with pytest.raises(StoreError, match="16 images share a name"):
        derive(labels_of(PHOTOS), twins, tmp_path / "twins", tmp_path / "twin")


# ---- The runner ------------------------------------------------------------------------------------------------------------------


def test_a_study_runs_once_with_equal_budgets_and_is_then_done(place, capsys):
    study = tiny_study(Images("photos", wrong=0.4), evaluations=3)
    broken = dataclasses.replace(study.arms[0], recipe=dataclasses.replace(study.arms[0].recipe, student="python:photos:failing_net"))
    assert run.run_studies([lambda _: dataclasses.replace(study, arms=(broken, *study.arms))], place) == 1
    assert "fails on images of 16 x 16 pixels" in capsys.readouterr().err, "a run that fails is named, and the others go on"
    rows = read_rows(runs_file(place.results, "tiny"))
    assert {(row["config"], row["seed"]) for row in rows} == {(arm.config, str(seed)) for arm, seed in study.runs()}
    assert len(rows) == 3
    for row in rows:
        assert tuple(row) == RUN_COLUMNS
        assert (row["steps"], row["crops"], row["val_images"], row["attempts"]) == ("6", "48", "12", "1")
        assert 0.0 <= float(row["top1_last"]) <= float(row["top1_best"]) <= 1.0
        assert float(row["cpu_seconds"]) > 0.5
    by_method = {row["method"]: row for row in rows}
    assert by_method["hard labels + smoothing"]["teacher"] == ""
    assert int(by_method["FerKD (target)"]["discarded"]) > 0
    assert int(by_method["FerKD (target)"]["usable_images"]) < int(by_method["FKD"]["usable_images"]) == 30
    curves = read_rows(curves_file(place.results, "tiny"))
    assert [row["step"] for row in curves if row["config"] == rows[0]["config"]] == ["2", "4", "6"]

    before = runs_file(place.results, "tiny").read_text()
    assert run.run_studies([lambda _: study], place) == 0
    assert runs_file(place.results, "tiny").read_text() == before
    assert "3 of    3 runs done" in run.listing({"tiny": lambda _: study}, place.results)

    # The work folder may be lost: only what the table lacks is made again, with the same figures.
    shutil.rmtree(place.work)
    lost = by_method["hard labels + smoothing"]
    kept = [line for line in before.splitlines(keepends=True) if lost["config"] not in line]
    runs_file(place.results, "tiny").write_text("".join(kept))
    assert run.run_studies([lambda _: study], place) == 0
    again = read_rows(runs_file(place.results, "tiny"))[-1]
    assert {name: again[name] for name in ("config", "seed", "top1_last", "top1_best")} == {
        name: lost[name] for name in ("config", "seed", "top1_last", "top1_best")
    }
    assert not (place.work / "labels").exists()


SLOW_RUNNER = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {repository!r}]
import test_convergence as t
from bench.convergence import datasets, run
datasets.SOURCES["photos"] = t.renamed_photos
study = t.tiny_study()
arm = t.dataclasses.replace(study.arms[0], recipe=t.dataclasses.replace(study.arms[0].recipe, steps=20_000))
def install(stop):
    t.signal.signal(t.signal.SIGTERM, lambda *_: stop())
place = run.Place(Path({work!r}), Path({work!r}), Path({results!r}), jobs=1)
sys.exit(run.run_studies([lambda _: t.Study("slow", (arm,), (0,))], place, install))
"""


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_its_runs_save_and_end_with_it(place, kill):
    tests = Path(__file__).resolve().parent
    code = SLOW_RUNNER.format(tests=str(tests), repository=str(tests.parent), work=str(place.work), results=str(place.results))
    runner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        log = None
        for _ in range(600):
            log = next(place.work.glob("runs/slow/*/log.jsonl"), None)
            if log is not None and log.read_text():
                break
            time.sleep(0.1)
        assert log is not None, "the run began"
        runner.send_signal(kill)
        assert runner.wait(60) == (75 if kill == signal.SIGTERM else -signal.SIGKILL)
    finally:
        if runner.poll() is None:
            runner.kill()
        runner.stdout.close()
    with open(log.parent.with_suffix(".lock"), "w") as lock:  # free only when the run itself is gone
        fcntl.flock(lock, fcntl.LOCK_EX)
    assert (log.parent / "checkpoint.pt").exists()
    assert not runs_file(place.results, "slow").exists()
    attempts = [set(json.loads(line)) for line in log.parent.with_suffix(".attempts").read_text().splitlines()]
    assert attempts == ([{"begun"}, {"cpu", "wall", "facts"}] if kill == signal.SIGTERM else [{"begun"}]), "time that is known is kept"


def test_the_processor_time_of_an_attempt_that_was_lost_is_not_made_up(place):
    study = tiny_study()
    shares = dict.fromkeys(("top1", "best_top1", "top5", "top1_folders"), 0.5)
    summary = {**shares, "steps": 6, "crops": 48, "val_images": 3, "usable_images": 27, "stored_regions": None, "seconds": 1.0}
    arm = study.arms[0]
    whole = run.row(study, arm, 0, place, summary, [{"begun": 1.0}, {"cpu": 2.0, "wall": 3.0}])
    assert (whole["cpu_seconds"], whole["wall_seconds"], whole["attempts"]) == ("2.0", "3.0", 1)
    then = {"cpu": 2.0, "wall": 3.0, "facts": {"commit": "abc", "finished": "then"}}
    later = run.row(study, arm, 0, place, summary, [{"begun": 1.0}, then])
    assert (later["commit"], later["finished"]) == ("abc", "then"), "of the run, not of the row's writing"
    lost = run.row(study, arm, 0, place, summary, [{"begun": 1.0}, {"begun": 2.0}, {"cpu": 2.0, "wall": 3.0}])
    assert (lost["cpu_seconds"], lost["wall_seconds"], lost["attempts"]) == ("", "", 2)


def test_two_runners_do_not_share_a_work_folder(place, capsys):
    place.work.mkdir()
    with open(place.work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run.run_studies([lambda _: tiny_study()], place) == 2
    assert "another runner" in capsys.readouterr().err


def test_a_line_cut_short_is_dropped_and_other_columns_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    append_rows(path, ("a", "b"), [{"a": 1, "b": 2}])
    with open(path, "a") as file:
        file.write("3,")
    assert read_rows(path) == [{"a": "1", "b": "2"}]
    append_rows(path, ("a", "b"), [{"a": 5, "b": 6}])
    assert read_rows(path) == [{"a": "1", "b": "2"}, {"a": "5", "b": "6"}]
    with pytest.raises(ValueError, match="other columns"):
        append_rows(path, ("a", "c"), [{"a": 1, "c": 2}])


def tuned_as_if(results, study, top1, column="top1_last"):
    """Rows of a tuning study as if every run of it had ended with top1(arm, seed) in `column`, and the other way round in the other."""
    other = {"top1_last": "top1_folders_last", "top1_folders_last": "top1_last"}[column]
    path = runs_file(results, study.name)
    done = {(row["config"], row["seed"]) for row in read_rows(path)}
    rows = [
        {"config": arm.config, "seed": seed, column: top1(arm, seed), other: 1.0 - top1(arm, seed)}
        for arm, seed in study.runs()
        if (arm.config, str(seed)) not in done
    ]
    append_rows(path, RUN_COLUMNS, rows)


def test_tuning_chooses_by_its_rules_and_what_waits_for_it_is_made_afterwards(tmp_path):
    with pytest.raises(studies.NotTuned, match="tune-rate"):
        studies.cifar_main(tmp_path)
    assert [study.name for study in run.made(list(studies.STUDIES.values()), tmp_path)] == ["tune-rate"]
    assert "waits until tune-rate is complete" in run.listing(studies.STUDIES, tmp_path)

    rates = {(0.2, False): 0.5, (0.2, True): 0.6, (0.4, True): 0.64}
    tuned_as_if(tmp_path, studies.tune_rate(tmp_path), lambda arm, _: rates.get((arm.recipe.lr, arm.method.uses_labels), 0.45))
    assert studies.rate(tmp_path) == 0.2, "the mean over both methods counts"

    def top1(arm, seed):
        policy = arm.method.policy
        value = {("max", 0.9, 0.0): 0.70, ("max", 0.7, 0.0): 0.69, ("max", 0.5, 0.0): 0.68}.get(
            (policy.confidence, policy.discard_below, policy.calibrate_below), 0.6
        )
        return (
            value
            - (0.1 if seed and policy.discard_below == 0.9 else 0.0)
            + (0.05 if policy.confidence == "target" and arm.images.wrong else 0.0)
        )

    grid = studies.tune_thresholds(tmp_path)
    assert (len(list(grid.runs())), grid.again) == (34, ())
    assert {arm.recipe.lr for arm in grid.arms} == {0.2}
    tuned_as_if(tmp_path, grid, top1)
    finals = studies.tune_thresholds(tmp_path)
    assert len(finals.again) == 2 * (1 + 3 + 3)
    with pytest.raises(studies.NotTuned):
        studies.chosen(tmp_path)
    tuned_as_if(tmp_path, finals, top1)
    chosen = studies.chosen(tmp_path)
    assert chosen.thresholds["max", 0.0] == chosen.thresholds["max", 0.4] == (0.7, 0.0), "the best from seed 0 fell back from the others"
    assert chosen.primary == "max"

    def ten_way(arm, seed):
        return {("max", 0.3): 0.8, ("target", 0.01): 0.7}.get((arm.method.policy.confidence, arm.method.policy.discard_below), 0.6)

    tuned_as_if(tmp_path, studies.imagenette_tune(tmp_path), ten_way, "top1_folders_last")
    tuned_as_if(tmp_path, studies.imagenette_tune(tmp_path), ten_way, "top1_folders_last")
    ours = {arm.method.name: arm.method.policy for arm in studies.imagenette(tmp_path).arms}
    assert (ours["FerKD (max)"].discard_below, ours["FerKD (target)"].discard_below) == (0.3, 0.01), "tuned by ten-way accuracy"
    assert ours["FerKD + SelfMix"] == ours["FerKD (max)"]
    before = studies.imagenette(tmp_path).arms
    for _ in range(2):
        tuned_as_if(tmp_path, studies.imagenette_tune_folders(tmp_path), ten_way, "top1_folders_last")
    fkd, among_folders = studies.imagenette(tmp_path).arms[len(before) :]
    assert {arm.labels.labelling.teacher for arm in (fkd, among_folders)} == {"lite0-folders"}
    assert (fkd.method, among_folders.method.policy.discard_below) == (FKD, 0.01), "tuned by themselves, beside what was there"

    made = run.made(list(studies.ALL_STUDIES.values()), tmp_path)
    assert [study.name for study in made] == list(studies.ALL_STUDIES)
    assert set(analyse.SECTIONS) == set(studies.ALL_STUDIES)
    for study in made:
        runs = [(arm.config, seed) for arm, seed in study.runs()]
        assert len(set(runs)) == len(runs), study.name
        for arm in study.arms:
            if arm.labels:
                policy = arm.method.policy
                assert policy.discard_above > policy.discard_below, "something is left to learn from"
                assert arm.labels.labelling.teacher in settings.TEACHERS
                assert arm.labels.labelling.crops >= arm.labels.crops
            assert arm.images.held_out == study.name.removeprefix("imagenette-").startswith("tune")


def test_a_cell_gets_ten_seeds_by_the_rule_and_only_then(place):
    wrong = tiny_study(Images("photos", wrong=0.4))
    study = dataclasses.replace(tiny_study(), arms=tiny_study().arms + wrong.arms, seeds=(0, 1, 2, 3, 4))
    spread = (-0.02, 0.02, -0.01, 0.01, 0.0)

    def rows(studied, seeds):
        told = made_up_rows(studied, place, lambda method, seed: 0.6 if method == "FerKD (target)" else 0.6 + spread[seed])
        return [row for row in told if int(row["seed"]) in seeds]

    file = runs_file(place.results, "tiny")
    append_rows(file, RUN_COLUMNS, rows(study, (0, 1, 2, 3)))
    assert not studies.extended(study, "FerKD (target)", place.results).extended, "not before there are five"
    append_rows(file, RUN_COLUMNS, rows(study, (4,)))
    assert studies.extended(study, "FerKD (target)", place.results).extended == study.arms
    file.unlink()
    for row in rows(study, (0, 1, 2, 3, 4)):
        clear = row["method"] == "FerKD (target)" and row["wrong"] == 0.4
        append_rows(file, RUN_COLUMNS, [{**row, "top1_last": 0.9} if clear else row])
    extended = studies.extended(study, "FerKD (target)", place.results)
    assert extended.extended == tiny_study().arms, "where the five are clear they are enough"
    assert sorted({seed for _, seed in extended.runs()}) == list(range(10))
    assert len(list(extended.runs())) == 6 * 5 + 3 * 5

    later = dataclasses.replace(tiny_study(), name="later")
    left = run.Queue([lambda results: extended, lambda results: later], place, run.Children(1)).left()
    assert [study.name for study, _, _ in left] == ["later"] * 3 + ["tiny"] * 15, "the further seeds wait until every study has its own"


@pytest.mark.parametrize("stride", [1, 2])
def test_the_shortcut_drops_every_second_pixel_and_so_does_its_gradient(stride):
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    block = models._Block(4, 8, stride)
    nn.init.zeros_(block.bn2.weight)  # silences the residual: the shortcut alone is left
    shown = block(x)
    expected = torch.relu(x[:, :, ::stride, ::stride])
    assert torch.equal(shown[:, 2:6], expected)
    assert not shown[:, [0, 1, 6, 7]].any(), "the further channels are zeros"
    (gradient,) = torch.autograd.grad(shown.sum(), x)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    assert torch.equal(gradient, wanted)


# ---- The tables ------------------------------------------------------------------------------------------------------------------


def test_paired_differences_are_those_of_the_paired_t_test():
    first, second = np.random.default_rng(0).normal(0.6, 0.01, (2, 5))
    found = paired_difference(dict(enumerate(first)), {**dict(enumerate(second)), 9: 0.0})
    known = stats.ttest_rel(first, second)
    interval = known.confidence_interval(0.95)
    np.testing.assert_allclose([found.mean - found.half_width, found.mean + found.half_width, found.p], [*interval, known.pvalue])
    assert found.n == 5, "a seed that only one of them has does not count"
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert np.isnan(paired_difference({0: 1.0}, {0: 0.5}).p)
    assert paired_difference({0: 1.0, 1: 1.0}, {0: 0.5, 1: 0.5}).p == 0.0


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.04, float("nan"), 0.01]) == pytest.approx([0.04, float("nan"), 0.02], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def made_up_rows(study, place, top1):
    rows = []
    for arm, seed in study.runs():
        share = top1(arm.method.name, seed)
        shares = dict.fromkeys(("top1", "best_top1", "top5", "top1_folders"), share)
        regions = {"discarded": 1, "calibrated": 2, "kept": 7} if arm.labels else None
        summary = {**shares, "steps": 6, "crops": 48, "val_images": 12, "usable_images": 30, "stored_regions": regions, "seconds": 1.0}
        rows.append(run.row(study, arm, seed, place, summary, [{"begun": 1.0}, {"cpu": 2.0, "wall": 3.0}]))
    return rows


def test_the_planned_comparisons_and_the_rule_for_more_seeds(place):
    study = dataclasses.replace(tiny_study(), seeds=(0, 1, 2, 3, 4))
    spread = (-0.02, 0.02, -0.01, 0.01, 0.0)
    unclear = {"FKD": lambda seed: 0.5 + spread[seed], "FerKD (target)": lambda seed: 0.505, "hard labels + smoothing": lambda seed: 0.3}
    rows = made_up_rows(study, place, lambda method, seed: unclear[method](seed))
    table = tables.design_tables(rows)
    assert "| FerKD (target) | 50.50 | 0.00 | 5 |" in table
    assert "| FerKD (target) - FKD | +0.50 ± 1.96 | 5 | 0.52 | no |" in table
    assert "| FKD - hard labels + smoothing | +20.00 ± 1.96 | 5 |" in table
    assert "rule for more seeds: ten" in table
    clear = made_up_rows(study, place, lambda method, seed: {"FKD": 0.5, "FerKD (target)": 0.52}.get(method, 0.3) + spread[seed] / 10)
    assert "rule for more seeds: five are enough" in tables.design_tables(clear)


def test_the_report_is_made_from_whatever_rows_there_are(place, monkeypatch):
    study = dataclasses.replace(tiny_study(evaluations=3), name="convergence")
    main = dataclasses.replace(study, name="cifar-main")
    monkeypatch.setattr(analyse, "ALL_STUDIES", {"convergence": lambda _: study, "cifar-main": lambda _: main})
    monkeypatch.setattr(sys, "argv", ["analyse", "--results", str(place.results)])
    place.results.mkdir()
    assert analyse.main() == 0
    for name in ("convergence", "cifar-main"):
        append_rows(runs_file(place.results, name), RUN_COLUMNS, made_up_rows(study, place, lambda *_: 0.5)[:2])
    curve = [{"config": study.arms[1].config, "seed": 0, "step": step, "crops": 8 * step, "seconds": 1, "top1": 0.4} for step in (2, 4, 6)]
    append_rows(curves_file(place.results, "convergence"), CURVE_COLUMNS, curve)
    assert analyse.main() == 0
    text = (place.results / "convergence.md").read_text()
    assert "`convergence`: 2 of 3 runs" in text
    assert "FKD" in text
    for name in ("convergence.png", "convergence-cifar-main.png"):
        assert 1_000 < (place.results / name).stat().st_size < 200_000


def test_why_counts_the_teacher_against_what_is_told_and_what_is_true(place, tmp_path):
    clean = prepare(PHOTOS, place.work, place.data)
    images = Images("photos", wrong=0.4)
    labels = Labels(Labelling("colours", PHOTOS, 12, 0.08), images, crops=12, min_scale=0.08, k=2)
    store = derive(
        labels, write_store(clean, tmp_path / "labelled", crops=12, k=3), prepare(images, place.work, place.data), tmp_path / "store"
    )
    arm = Arm(ferkd("target", 0.2, 0.6), tiny_study().arms[0].recipe, images, 0.08, labels)
    rows = list(why.counted(arm, store, names(clean)))
    for by in ("region", "confidence", "scale"):
        mine = [row for row in rows if row["by"] == by]
        assert sum(row["crops"] for row in mine) == 30 * 12
        assert sum(row["crops"] * float(row["told_true"]) for row in mine) == pytest.approx(0.6 * 360, abs=0.2)
    counted = inspect_store(store, arm.method.policy)
    regions = {row["group"]: row for row in rows if row["by"] == "region"}
    assert [regions[name]["crops"] for name in ("discarded", "calibrated", "kept")] == counted.regions.tolist()
    agreement = [float(regions[name]["teacher_as_told"]) for name in ("discarded", "calibrated", "kept")]
    np.testing.assert_allclose(agreement, (counted.region_agree / counted.regions).tolist(), atol=1e-4)
    longer, varied = dataclasses.replace(arm.recipe, steps=99), dataclasses.replace(arm, varied="k = 1")
    fkd = dataclasses.replace(arm, method=FKD)
    assert why.stores_and_policies([arm, dataclasses.replace(arm, recipe=longer), varied, fkd]) == [dataclasses.replace(arm, recipe=longer)]
