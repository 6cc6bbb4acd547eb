"""The demo: its digits, its whole way in a shortened form, and a table that claims no more than its runs show."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from photos import write_photos
from PIL import Image

from ferkd.demo import DemoSettings, comparison, run_demo, write_digits
from ferkd.errors import InputError


def test_the_digits_are_an_image_folder(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    write_digits(tmp_path)
    train, val = (sorted((tmp_path / split).glob("*/*.png")) for split in ("train", "val"))
    assert (len(train), len(val)) == (1000, 797)
    assert {path.parent.name for path in train} == {str(digit) for digit in range(10)}
    with Image.open(train[0]) as picture:
        assert (picture.size, picture.mode) == ((48, 48), "RGB")
        assert np.asarray(picture).std() > 10


def test_the_whole_demo_leaves_a_table_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    out = tmp_path / "demo"
    figures = run_demo(DemoSettings(out=out, crops=4, epochs=6.0, seeds=1))
    assert figures["top1"].keys() == {"hard labels", "FKD", "FerKD"}
    assert all(len(values) == 1 and values[0] > 0.1 for values in figures["top1"].values())
    for name in ("crops.png", "confidence.png", "curves.png", "labels.html", "report.html"):
        assert (out / name).stat().st_size > 5_000
    assert json.loads((out / "demo.json").read_text())["inspection"]["crops"] == 4000
    assert "no difference beyond the spread" in (out / "table.txt").read_text()  # one seed shows nothing
    with pytest.raises(InputError, match="is not empty"):
        run_demo(DemoSettings(out=out))


def test_the_demo_takes_photographs_and_a_teacher(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    photos = write_photos(tmp_path / "photos", train=12, val=8)
    settings = DemoSettings(
        tmp_path / "demo", photos, "python:photos:colour_teacher", student="python:photos:tiny_net", image_size=16, crops=4
    )
    figures = run_demo(dataclasses.replace(settings, epochs=6.0, seeds=2))
    assert all(len(values) == 2 for values in figures["top1"].values())
    assert figures["inspection"]["crops"] == 36 * 4
    assert (tmp_path / "demo" / "crops.png").is_file()


@pytest.mark.parametrize(
    ("ferkd", "verdict"),
    [
        ([0.80, 0.81, 0.82], "a difference beyond the spread"),
        ([0.70, 0.80, 0.75], "no difference beyond the spread"),
        ([0.9], "no difference"),
    ],
)
def test_the_table_claims_no_difference_within_the_spread(ferkd: list[float], verdict: str) -> None:
    fkd = [0.70, 0.72, 0.71][: len(ferkd)]
    text = comparison({"hard labels": fkd, "FKD": fkd, "FerKD": ferkd})
    assert verdict in text.splitlines()[-2]
    assert "no difference beyond the spread" in text.splitlines()[-1]
