"""One reading of a store counts what every policy would do, to the crop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import write_photos, write_store

import ferkd.inspection
from ferkd.cli import main
from ferkd.inspection import CANDIDATES, SCALES, ConfidenceCounts, Inspection, inspect_store, sample_crops, sample_images, say_progress
from ferkd.regions import Region, RegionPolicy, confidence_of, region_of
from ferkd.report import inspection_table
from ferkd.store import LabelStore

KINDS = ("max", "target")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "data")


@pytest.fixture(scope="module", params=["exact", "compact"])
def store(request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    compact = request.param == "compact"
    return write_store(photos, tmp_path_factory.mktemp("labels") / "store", unreadable=5, compact=compact)


def crops_of(store: LabelStore, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidence and agreement of every crop, [images, M], one by one."""
    confidence, agree = [], []
    for image in range(len(store)):
        labels = store.read(image)
        if labels.width:
            ids, probs = (torch.from_numpy(part) for part in store.unpack(labels.label_words))
            confidence.append(confidence_of(ids, probs, torch.full((store.crops,), labels.target), store.classes, kind))
            agree.append(ids[:, 0] == labels.target)
    return torch.stack(confidence), torch.stack(agree)


def some_policies() -> list[RegionPolicy]:
    random = np.random.default_rng(0)
    found = [RegionPolicy(), RegionPolicy(calibrate_below=1.0), RegionPolicy(discard_below=1.0, calibrate_below=1.0)]
    for _ in range(20):
        below, calibrate, above = sorted((random.integers(0, 1001, 3) / 1000).tolist())
        found.append(RegionPolicy(below, calibrate, above, confidence=KINDS[int(random.integers(2))]))
    return [*found, RegionPolicy(0.25, 0.5, 0.75), RegionPolicy(0.5, 0.5, 0.5), RegionPolicy(discard_above=0.9995, confidence="target")]


def test_any_policy_can_be_applied_to_the_counts_of_one_reading(store: LabelStore) -> None:
    inspection = inspect_store(store, RegionPolicy())
    assert (inspection.images, inspection.unreadable, inspection.crops) == (23, 1, 23 * 12)
    for policy in some_policies():
        confidence, agree = crops_of(store, policy.confidence)
        region = region_of(confidence, policy)
        crops, right = inspection.counts[policy.confidence].regions(policy)
        for value in Region:
            assert crops[value] == int((region == int(value)).sum())
            assert right[value] == int(agree[region == int(value)].sum())
        assert crops.tolist() == store.scan(policy).counts.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_policys_own_thresholds_are_counted_exactly_wherever_they_lie(store: LabelStore, kind: str) -> None:
    """Also on a stored confidence, which is then not below."""
    confidence, _ = crops_of(store, kind)
    ranked = sorted(confidence.flatten().tolist())
    policy = RegionPolicy(ranked[60], ranked[150], ranked[250], confidence=kind)
    inspection = inspect_store(store, policy)
    region = region_of(confidence, policy)
    assert inspection.regions.tolist() == [int((region == int(value)).sum()) for value in Region]
    assert inspection.regions[Region.DISCARDED] == sum(value < ranked[60] or value > ranked[250] for value in ranked)
    assert inspection.images_without_survivor == int((region == Region.DISCARDED.value).all(dim=1).sum())


def test_images_are_counted_at_their_most_confident_crop(store: LabelStore) -> None:
    """So that a page can say how many a threshold empties."""
    counts = inspect_store(store, RegionPolicy()).counts["target"]
    edge = counts.edges.tolist().index(0.95)
    assert counts.images[: 2 * edge].sum() == int((crops_of(store, "target")[0].amax(dim=1) < np.float32(0.95)).sum()) > 0


def test_the_result_does_not_depend_on_how_the_store_is_cut_up(store: LabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = RegionPolicy(0.4, 0.6)
    whole = json.dumps(inspect_store(store, policy).as_json())
    seen: list[int] = []
    monkeypatch.setattr(ferkd.inspection, "_CHUNK_CROPS", 5 * store.crops)
    assert json.dumps(inspect_store(store, policy, seen.append).as_json()) == whole
    assert seen == [5, 10, 15, 20, 24]


def test_a_long_reading_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    say_progress(5000)(1000)
    assert capsys.readouterr().err == ""
    say_progress(5000, every=0.0)(1000)
    assert capsys.readouterr().err == "read the labels of 1,000 of 5,000 images\n"


def test_a_threshold_that_was_not_counted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.12345 is none of the thresholds that were counted"):
        ConfidenceCounts("max", (0.0, 0.5, 1.0)).regions(RegionPolicy(discard_below=0.12345))


def test_bands_of_scale_and_confidence() -> None:
    inspection = Inspection(RegionPolicy(), np.ones(3, bool))
    ids = np.array([[[0, 1], [0, 1], [1, 0]]])
    probs = np.array([[[0.5, 0.2], [0.97, 0.01], [1.0, 0.0]]], np.float32)
    inspection.add(ids, probs, np.array([0]), np.array([[0.07, 0.08, 1.0]]))
    assert inspection.by_confidence.crops.nonzero()[0].tolist() == [10, 19]
    assert inspection.by_confidence.crops[[10, 19]].tolist() == [1, 2]
    assert inspection.by_confidence.agree[[10, 19]].tolist() == [1, 1]
    assert inspection.by_scale.crops.tolist() == [1, 1, 0, 0, 0, 0, 1]
    assert inspection.by_scale.agree.tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert inspection.by_scale.confidence[[0, 1, 6]].tolist() == pytest.approx([0.5, 0.97, 1.0])
    assert len(inspection.by_scale.crops) == len(SCALES) - 1


def test_probability_on_classes_without_a_folder_is_counted_and_said() -> None:
    inspection = Inspection(RegionPolicy(), np.array([True, False, True, False, False, False]))
    ids = np.array([[[0, 1], [1, 3]]])
    probs = np.array([[[0.52, 0.3], [0.4, 0.2]]], np.float32)
    inspection.add(ids, probs, np.array([0]), np.array([[0.5, 0.5]]))
    # Of the tails of 0.18 and 0.4, spread over four classes, one and two have a folder.
    assert inspection.elsewhere == pytest.approx(1 - (0.52 + 0.18 / 4 + 0.4 * 2 / 4) / 2)
    assert inspection.as_json()["elsewhere"] == pytest.approx(0.6175)
    assert "62% of the teacher's probability goes to the 4 of its 6 classes that have no folder; --classes folder" in (
        inspection_table(inspection)
    )
    everywhere = Inspection(RegionPolicy(), np.ones(6, bool))
    everywhere.add(ids, probs, np.array([0]), np.array([[0.5, 0.5]]))
    assert everywhere.elsewhere == 0.0
    assert "no folder" not in inspection_table(everywhere)


def test_the_table_says_what_each_candidate_would_do(store: LabelStore) -> None:
    inspection = inspect_store(store, RegionPolicy())
    text = inspection_table(inspection)
    lines = text[text.index("What other thresholds") :].splitlines()[3:]
    assert len(lines) == len(CANDIDATES)
    row = next(line for line in lines if line.split()[:4] == ["<", "0.2", "<", "0.5"])
    expected = ""
    for kind in KINDS:
        confidence, agree = crops_of(store, kind)
        region = region_of(confidence, RegionPolicy(0.2, 0.5, confidence=kind))
        for value in Region:
            part = region == value.value
            expected += f" {part.double().mean():.0%} ({agree[part].double().mean():.0%})" if part.any() else " 0% (-)"
    assert " ".join(row.split()).endswith(expected)


def test_quantiles_are_shares_of_the_store(store: LabelStore, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", str(store.path), "--thresholds", "quantile", "--discard-below", "0.1", "--calibrate-below", "0.3"]
    main([*arguments, "--json"])
    counted = json.loads(capsys.readouterr().out)
    assert counted["regions"]["discarded"] / counted["crops"] == pytest.approx(0.1, abs=0.02)
    assert counted["regions"]["calibrated"] / counted["crops"] == pytest.approx(0.2, abs=0.02)
    main(arguments)
    said = capsys.readouterr().out
    assert f"thresholds: discard_below {counted['policy']['discard_below']:.6g}" in said
    assert f"policy: discard below {counted['policy']['discard_below']:.6g}" in said


def test_samples_are_spread_over_the_store_and_over_confidence(store: LabelStore) -> None:
    assert sample_images(store, 4) == [0, 8, 15, 23]
    assert 5 not in sample_images(store, 24)
    confidence = np.array([0.3, 0.9, 0.1, 0.5], np.float32)
    assert sample_crops(confidence, 3).tolist() == [2, 3, 1]
    assert sample_crops(confidence, 9).tolist() == [2, 0, 3, 1]
