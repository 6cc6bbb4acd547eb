"""What labelling would cost: the figures are those of a real store, and the rate decides the hours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from photos import write_photos, write_store

from ferkd.cli import main
from ferkd.errors import InputError
from ferkd.plan import PlanSettings, plan, plan_table


@pytest.mark.parametrize("layout", ["exact", "compact"])
def test_bytes_are_those_of_a_store(tmp_path: Path, layout: str) -> None:
    data = write_photos(tmp_path / "data")
    store = write_store(data, tmp_path / "store", compact=layout == "compact")
    found = plan(PlanSettings(images=24, crops=12, topk=2, classes=3, layout=layout))  # type: ignore[arg-type]
    m = store.manifest
    assert (found.crop_bytes, found.label_bytes, found.shards) == (m.crop_bytes, sum(shard.bytes for shard in m.shards), len(m.shards))
    assert found.teacher_passes == 24 * 12
    paths = sum(len(path) for path in store.paths)
    assert found.index_bytes - 30 * 24 == m.index.bytes - paths


def test_imagenets_figures() -> None:
    found = plan(PlanSettings(images=1_281_167, crops=500, topk=5, classes=1000, layout="compact", rate=2500, devices=8))
    assert (found.crop_bytes, found.label_bytes) == (12, 1_281_167 * 500 * 12)
    assert found.hours == pytest.approx(1_281_167 * 500 / 2500 / 8 / 3600)
    assert found.shards == -(-1_281_167 // 5056)


def test_a_table_for_people_and_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--images", "1281167", "--classes", "1000", "--rate", "3000", "--devices", "8"])
    text = capsys.readouterr().out
    assert "28   (exact, top 5 of 1,000)" in text
    assert "7.2 GB in 254 shards" in text
    assert "2.97   at 3,000.0 crops/s (as given) x 8 devices" in text
    main(["plan", "--images", "1000", "--classes", "10", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["crops"], found["hours"], found["crop_bytes"]) == (200_000, None, 28)
    assert "give --rate CROPS_A_SECOND" in plan_table(PlanSettings(10, 10), plan(PlanSettings(10, 10)))


def test_a_teacher_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferkd.plan.MEASURE_SECONDS", 0.01)
    settings = PlanSettings(1000, 3, teacher="python:photos:colour_teacher", batch_size=8)
    found = plan(settings)
    assert found.rate is not None
    assert found.rate > 0
    assert found.hours == pytest.approx(200_000 / found.rate / 3600)
    assert "measured, the bare teacher on noise" in plan_table(settings, found)


def test_wrong_use() -> None:
    for changes, says in (
        ({"images": 0}, "images: 0"),
        ({"devices": 0}, "devices: 0"),
        ({"rate": 0.0}, "rate: 0.0"),
        ({"rate": float("nan")}, "rate: nan"),
        ({"rate": 1.0, "teacher": "x"}, "--rate and --teacher: give one"),
        ({"input_size": 8}, "go with --teacher"),
        ({"topk": 11}, "k: 11 of 10 classes"),
        ({"classes": 1, "topk": 1}, "classes: 1"),
    ):
        with pytest.raises(InputError, match=says):
            plan(PlanSettings(**{"images": 10, "classes": 10, **changes}))  # type: ignore[arg-type]
