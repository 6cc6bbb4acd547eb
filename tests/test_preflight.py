"""A teacher fed with the wrong thing is refused before it labels, and the error names what is wrong."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_teachers import GREYS

from ferkd.crops import CropSettings
from ferkd.errors import CheckFailed, InputError
from ferkd.preflight import SCALE_BANDS, PreflightReport, preflight
from ferkd.sources import scan_split
from ferkd.teacher import choose_classes, load_teacher


@pytest.fixture(scope="module")
def greys(tmp_path_factory):
    """Noisy pictures of eight grey levels, 30 px: DIR/{train,val}/g0..g7."""
    root = tmp_path_factory.mktemp("greys")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 30)):
        for i, level in enumerate(GREYS):
            folder = root / split / f"g{i}"
            folder.mkdir(parents=True)
            for number in range(count):
                shade = level + random.normal(0, 6)
                pixels = np.clip(shade + random.normal(0, 30, (30, 30, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def report_on(root, name: str, *, choice: str = "teacher", val: bool = True, input_size: int | None = None) -> PreflightReport:
    train = scan_split(root, "train")
    teacher = load_teacher(f"python:tiny_teachers:{name}", input_size=input_size)
    classes = choose_classes(choice, train.folders, teacher)
    return preflight(teacher, classes, train, scan_split(root, "val") if val else None, CropSettings())


def test_a_good_teacher_passes_with_its_figures(greys):
    report = report_on(greys, "grey")
    report.require()
    assert report.top1 > 0.8
    assert (report.images, report.crops, report.source) == (240, 500, "val")
    assert report.agreement > 0.8
    assert report.limit == pytest.approx(1 / 8 + 0.25 * 7 / 8)
    assert sum(band.crops for band in report.bands) == 500
    assert [(band.low, band.high) for band in report.bands] == list(itertools.pairwise(SCALE_BANDS))
    assert sum(band.crops * band.agreement for band in report.bands) / 500 == pytest.approx(report.agreement)
    assert report.warnings == ()


def test_a_teacher_that_answers_probabilities_is_refused(greys):
    report = report_on(greys, "grey_with_softmax")
    with pytest.raises(CheckFailed, match=r"grey_with_softmax: answers probabilities, where logits are wanted.*take off its last softmax"):
        report.require()
    report_on(greys, "grey_with_log_softmax").require()  # the same labels as from logits


def test_without_val_it_looks_at_train_and_says_so(greys):
    assert "there is no val" in report_on(greys, "grey", val=False).source


def test_a_wrong_normalisation_is_named_with_what_it_costs(greys):
    report = report_on(greys, "wrong_normalisation")
    with pytest.raises(CheckFailed, match=r"Likely cause: normalisation: with \(x - 127\) / 128.*gets \d+\.\d% instead of \d+") as error:
        report.require()
    assert "(now mean (0.485, 0.456, 0.406)" in str(error.value)
    assert "--skip-preflight" in str(error.value)


@pytest.mark.parametrize("choice", ["teacher", "folder"])
def test_a_permuted_class_list_is_named_with_examples(greys, choice):
    with pytest.raises(CheckFailed, match=r"Likely cause: class order: .*'g0' is listed as class 5 but mostly answered as 0"):
        report_on(greys, "permuted", choice=choice).require()


def test_a_teacher_that_sees_nothing_has_no_excuse(greys):
    report = report_on(greys, "blind")
    with pytest.raises(CheckFailed, match=r"recognises [\d.]+% of 240 images of val; .* at least 34% is expected\. No other"):
        report.require()
    assert {alternative.kind for alternative in report.alternatives} >= {"normalisation", "input size"}


def test_a_wrong_input_size_is_named(greys):
    with pytest.raises(CheckFailed, match=r"Likely cause: input size: at 16 px it gets .* \(now 32 px\)"):
        report_on(greys, "sized", input_size=32).require()


def test_overconfidence_is_warned_of_overall_and_by_band(greys):
    report = report_on(greys, "overconfident")
    assert report.refusal is None
    assert report.confidence - report.agreement > 0.15
    assert any(warning.startswith("on crops the teacher is") for warning in report.warnings)
    assert any("on crops of 50% to 75% of the photo" in warning for warning in report.warnings)


def test_probability_on_classes_without_a_folder_is_warned_of(greys, tmp_path):
    for split in ("train", "val"):
        for name in ("g0", "g3", "g6"):
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / split / name).symlink_to(greys / split / name)
    report = report_on(tmp_path, "vague_by_name")
    report.require()
    assert 0.1 < report.elsewhere < 0.9
    (warning,) = (warning for warning in report.warnings if "no folder" in warning)
    assert warning.startswith(f"{report.elsewhere:.0%} of the teacher's probability goes to the 5 of its 8 classes that have no folder; ")
    assert "--classes folder" in warning
    among_folders = report_on(tmp_path, "vague_by_name", choice="folder")
    assert among_folders.elsewhere == 0.0
    assert not any("no folder" in warning for warning in among_folders.warnings)
    assert report_on(greys, "vague_by_name").elsewhere == 0.0


def test_the_preflight_is_repeatable(greys):
    first, second = report_on(greys, "vague"), report_on(greys, "vague")
    assert (first.top1, first.agreement, first.confidence, first.bands) == (second.top1, second.agreement, second.confidence, second.bands)


def test_a_teacher_that_answers_nan_is_refused(greys):
    teacher = load_teacher("python:tiny_teachers:grey")
    with torch.no_grad():
        teacher.model.levels[0] = float("nan")
    train = scan_split(greys, "train")
    with pytest.raises(InputError, match="answers NaN or infinity"):
        preflight(teacher, choose_classes("teacher", train.folders, teacher), train, None, CropSettings())


def test_photos_that_cannot_be_read_are_left_out(greys, tmp_path):
    for split in ("train", "val"):
        for i in range(8):
            (tmp_path / split / f"g{i}").mkdir(parents=True)
            (tmp_path / split / f"g{i}/bad.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="none of 8 images can be decoded"):
        report_on(tmp_path, "grey")
    for i in range(8):
        (tmp_path / f"val/g{i}/0.png").write_bytes((greys / f"val/g{i}/0.png").read_bytes())
        (tmp_path / f"train/g{i}/0.png").write_bytes((greys / f"train/g{i}/0.png").read_bytes())
    assert report_on(tmp_path, "grey").images == 8


def test_a_slow_teacher_is_shown_fewer_images(greys):
    train = scan_split(greys, "train")
    teacher = load_teacher("python:tiny_teachers:grey")
    classes = choose_classes("teacher", train.folders, teacher)
    report = preflight(teacher, classes, train, scan_split(greys, "val"), CropSettings(), seconds=0.0)
    assert (report.images, report.crops) == (64, 64)


# ---- Which classes are kept


def test_all_of_the_teachers_classes_or_the_folders_alone():
    teacher = load_teacher("python:tiny_teachers:permuted")
    every = choose_classes("teacher", ["g1", "g5"], teacher)
    assert every.names == ("g3", "g4", "g5", "g6", "g7", "g0", "g1", "g2")
    assert every.class_of_folder.tolist() == [6, 2]
    few = choose_classes("folder", ["g5", "g1"], teacher)
    assert few.names == ("g1", "g5")
    assert few.class_of_folder.tolist() == [1, 0]
    assert few.select(torch.arange(16.0).view(2, 8)).tolist() == [[6.0, 2.0], [14.0, 10.0]]


def test_one_folder_alone_is_no_classification():
    with pytest.raises(InputError, match="leaves 1 class"):
        choose_classes("folder", ["g1"], load_teacher("python:tiny_teachers:permuted"))


def test_the_folders_name_their_classes_of_an_imagenet_teacher():
    import dataclasses

    teacher = dataclasses.replace(load_teacher("python:tiny_teachers:grey"), outputs=1000)
    classes = choose_classes("teacher", ["n01440764_tench", "n02102040"], teacher)
    assert len(classes.names) == 1000
    assert (classes.names[0], classes.names[1], classes.names[217]) == ("n01440764_tench", "n01443537", "n02102040")
