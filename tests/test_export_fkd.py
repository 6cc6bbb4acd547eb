"""A store as FKD's files: what its training script makes of them is what the store says, under a policy too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fkd_files import CLASSES, read_as_fkd, write_labels
from photos import COLOURS, write_photos, write_store
from PIL import Image
from small_stores import files_of, make_store, small_plan, write_missing

from ferkd.cli import main
from ferkd.errors import InputError
from ferkd.interop.fkd import FkdSettings, convert_fkd
from ferkd.interop.fkd_export import LEFT_OUT, ExportSettings, export_fkd
from ferkd.records import pack_boxes, pack_labels
from ferkd.reference import adapt
from ferkd.regions import Region, RegionPolicy
from ferkd.store import LabelledImage, LabelStore, PathTable, StoreWriter

POLICY = RegionPolicy(discard_below=0.25, calibrate_below=0.5, discard_above=0.98, smoothing=0.2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "data", train=6)


def expected(store: LabelStore, image: int, policy: RegionPolicy) -> tuple[np.ndarray, np.ndarray]:
    """What training on the store would use: dense labels [M, C] by the loss's own reference, and regions [M]."""
    labels = store.read(image)
    ids, probs = (torch.from_numpy(part) for part in store.unpack(labels.label_words))
    target = torch.full((len(ids),), labels.target)
    adapted = adapt(ids, probs, target, classes=store.classes, policy=policy, temperature=1.0, tail="smooth")
    dense = adapted.base[:, None].repeat(1, store.classes).scatter_add_(1, adapted.ids, adapted.deltas)
    return dense.numpy(), adapted.region.numpy()


@pytest.mark.parametrize(
    ("k", "classes", "label_type"),
    [
        (1, 3, "smoothing"),
        (2, 8, "marginal_smoothing_k5"),
        (5, 8, "marginal_smoothing_k5"),
        (5, 5, "marginal_smoothing_k5"),
        (7, 30, "marginal_smoothing_k10"),
        (10, 30, "marginal_smoothing_k10"),
        (12, 30, "dense"),
        (2, 3, "dense"),
    ],
)
@pytest.mark.parametrize("policy", [RegionPolicy(), POLICY], ids=["all crops", "policy"])
def test_fkds_script_reads_what_the_store_says(
    data: Path, tmp_path: Path, k: int, classes: int, label_type: str, policy: RegionPolicy
) -> None:
    names = (*sorted(COLOURS), *(f"c{i}" for i in range(classes - 3)))
    store = write_store(data, tmp_path / "store", k=k, classes=names)
    exported = export_fkd(ExportSettings(store.path, tmp_path / "out", policy=policy, num_crops=2), lambda _: None)
    assert exported.label_type == label_type
    crops, regions = 0, np.zeros(3, int)
    for image in range(len(store)):
        labels = store.read(image)
        dense, region = expected(store, image, policy)
        regions += np.bincount(region, minlength=3)
        chosen = np.flatnonzero(region != Region.DISCARDED)
        if not len(chosen):
            assert exported.left_out[labels.path] == "every crop is discarded"
            continue
        chosen = np.resize(chosen, 2) if len(chosen) < 2 else chosen
        crops += len(chosen)
        boxes, flips = labels.boxes(chosen)
        script_boxes, script_flips, script_labels = read_as_fkd(
            tmp_path / "out", labels.path, (labels.width, labels.height), label_type, classes
        )
        assert script_boxes == [(left, top, left + w, top + h) for left, top, w, h in boxes.tolist()]
        assert script_flips == flips.tolist()
        # Where float16 rounded a sum above 1, FKD's script gives the other classes a little less than nothing.
        assert script_labels.min() > -5 * 2**-12
        np.testing.assert_allclose(script_labels.clip(0), dense[chosen], atol=2e-7)
    assert (exported.crops, exported.regions) == (crops, tuple(regions))
    assert policy == RegionPolicy() or (regions > 0).all() or k == 1


def test_a_compact_store_is_exported_too(data: Path, tmp_path: Path) -> None:
    store = write_store(data, tmp_path / "store", compact=True)
    export_fkd(ExportSettings(store.path, tmp_path / "out", label_type="dense"), lambda _: None)
    labels = store.read(3)
    boxes, _ = labels.boxes(np.arange(12))
    script, _, dense = read_as_fkd(tmp_path / "out", labels.path, (labels.width, labels.height), "dense", 3)
    assert script == [(left, top, left + w, top + h) for left, top, w, h in boxes.tolist()]
    np.testing.assert_allclose(dense, expected(store, 3, RegionPolicy())[0], atol=2e-7)


@pytest.mark.parametrize("label_type", ["hard", "smoothing", "marginal_smoothing_k5", "marginal_smoothing_k10", "dense"])
def test_there_and_back_again_keeps_every_box_and_probability(data: Path, tmp_path: Path, label_type: str) -> None:
    names = tmp_path / "names"
    names.write_text("\n".join([*sorted(COLOURS), *(f"c{i}" for i in range(CLASSES - 3))]))
    source = write_labels(data, tmp_path / "fkd", label_type)
    topk = CLASSES if label_type == "dense" else None
    store = convert_fkd(FkdSettings(source, tmp_path / "store", data, class_names=names, topk=topk), lambda _: None)
    export_fkd(ExportSettings(store.path, tmp_path / "out", label_type=label_type), lambda _: None)  # type: ignore[arg-type]
    again = convert_fkd(FkdSettings(tmp_path / "out", tmp_path / "again", data, class_names=names, topk=topk), lambda _: None)
    for image in range(len(store)):
        labels = store.read(image)
        size = (labels.width, labels.height)
        before = read_as_fkd(source, labels.path, size, label_type, CLASSES, weights_only=False)
        after = read_as_fkd(tmp_path / "out", labels.path, size, label_type, CLASSES)
        assert after[:2] == before[:2]
        np.testing.assert_allclose(after[2], before[2], atol=2**-12)
        assert again.read(image).label_words.tolist() == labels.label_words.tolist()
        assert again.read(image).box_words.tolist() == labels.box_words.tolist()  # type: ignore[union-attr]
    assert not json.loads((tmp_path / "out/ferkd-export.json").read_text())["left_out"]


def test_a_type_that_holds_less_must_be_asked_for(data: Path, tmp_path: Path) -> None:
    store = write_store(data, tmp_path / "store", k=3)
    export_fkd(ExportSettings(store.path, tmp_path / "out", label_type="smoothing"), lambda _: None)
    _, _, dense = read_as_fkd(tmp_path / "out", store.paths[0], (9, 9), "smoothing", 3)
    _, probs = store.unpack(store.read(0).label_words)
    np.testing.assert_allclose(dense.max(1), np.maximum(probs[:, 0], (1 - probs[:, 0]) / 2), atol=1e-6)
    export_fkd(ExportSettings(store.path, tmp_path / "hard", label_type="hard"), lambda _: None)
    ids, _ = store.unpack(store.read(0).label_words)
    assert read_as_fkd(tmp_path / "hard", store.paths[0], (9, 9), "hard", 3)[2].argmax(1).tolist() == ids[:, 0].tolist()
    with pytest.raises(InputError, match="marginal_smoothing_k10 needs 10 classes, and the store has 3; choose dense"):
        export_fkd(ExportSettings(store.path, tmp_path / "k10", label_type="marginal_smoothing_k10"), lambda _: None)


def test_repeated_classes_add_up(tmp_path: Path) -> None:
    plan = small_plan(images=1, crops=2, k=3, classes=12)

    def answers(plan: object, image: int) -> LabelledImage:
        ids, probs = np.array([[4, 9, 4], [1, 1, 1]]), np.array([[0.5, 0.25, 0.125], [0.5, 0.25, 0.125]], np.float32)
        return LabelledImage(50, 40, 1, pack_boxes(np.array([[0, 0, 9, 9]] * 2), np.zeros(2, bool)), pack_labels(ids, probs, "half", 12))

    with StoreWriter(tmp_path / "store", plan) as writer:
        write_missing(writer, answers)
    for label_type in ("dense", "marginal_smoothing_k5"):
        export_fkd(ExportSettings(tmp_path / "store", tmp_path / label_type, label_type=label_type), lambda _: None)  # type: ignore[arg-type]
        _, _, dense = read_as_fkd(tmp_path / label_type, plan.paths[0], (50, 40), label_type, 12)
        np.testing.assert_allclose(dense[0, [4, 9, 0]], [0.625, 0.25, 0.125 / 10], atol=1e-6)
        np.testing.assert_allclose(dense[1, [1, 0]], [0.875, 0.125 / 11], atol=1e-6)
        np.testing.assert_allclose(dense.sum(1), 1, atol=1e-6)


# ---- What FKD's script cannot do


def test_images_without_crops_are_named_and_few_crops_repeated(data: Path, tmp_path: Path) -> None:
    store = write_store(data, tmp_path / "store", unreadable=4)
    told: list[str] = []
    settings = ExportSettings(store.path, tmp_path / "out", policy=RegionPolicy(discard_below=0.93), num_crops=8)
    exported = export_fkd(settings, told.append)
    survivors = [(expected(store, image, settings.policy)[1] != Region.DISCARDED).sum() for image in range(len(store)) if image != 4]
    assert 0 < sum(0 < count < 8 for count in survivors) == exported.repeated
    assert exported.left_out[store.paths[4]] == "the store has no labels for it"
    lines = (tmp_path / "out" / LEFT_OUT).read_text().splitlines()
    assert [tuple(line.split("\t")) for line in lines] == list(exported.left_out.items())
    assert not (tmp_path / "out/train" / store.paths[4]).with_suffix(".tar").exists()
    assert any(line.startswith(f"WARNING: {len(lines)} images have no file (left-out.txt names them)") for line in told)
    for image in range(len(store)):
        if store.paths[image] not in exported.left_out:
            assert len(read_as_fkd(tmp_path / "out", store.paths[image], (9, 9), "dense", 3)[0]) >= 8


def test_photos_that_fkd_would_not_turn_are_left_out(tmp_path: Path) -> None:
    data = write_photos(tmp_path / "data", train=2)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 30)).save(data / "train/red/0.png", exif=exif)
    store = write_store(data, tmp_path / "store")
    Image.new("RGB", (10, 10)).save(data / "train/blue/1.png")
    (data / "train/green/0.png").unlink()
    told: list[str] = []
    assert not export_fkd(ExportSettings(store.path, tmp_path / "out"), told.append).left_out
    assert told[0].startswith("WARNING: the store's photos were turned by their EXIF orientation")
    told.clear()
    exported = export_fkd(ExportSettings(store.path, tmp_path / "out", data=data), told.append)
    assert exported.left_out["red/0.png"] == "has EXIF orientation 6, and FKD's script does not turn photos"
    assert exported.left_out["blue/1.png"].startswith("has 10 x 10 pixels, and had ")
    assert exported.left_out["green/0.png"] == "cannot be read: No such file or directory"
    assert not (tmp_path / "out/train/red/0.tar").exists()  # that the first export wrote
    assert not any("EXIF" in line for line in told)


def test_images_that_would_share_a_file_are_refused(tmp_path: Path) -> None:
    for paths, name in (
        (["a/x.1.jpg", "a/x.2.jpg", "a/y.jpg"], "train/a/x.tar"),
        (["dr. no/x.jpg", "dr. no/y.jpg", "a/y.jpg"], "train/dr.tar"),
    ):
        plan = small_plan(images=3, paths=PathTable.from_paths(paths))
        store = make_store(tmp_path / name.replace("/", "-"), plan)
        with pytest.raises(InputError, match=f"2 images share files in FKD's naming.*would all be {name}; rename them"):
            export_fkd(ExportSettings(store.path, tmp_path / "out"), lambda _: None)


def test_class_numbers_that_fkd_would_not_know_are_told(data: Path, tmp_path: Path) -> None:
    told: list[str] = []
    store = write_store(data, tmp_path / "store", classes=("red", "green", "blue"))
    export_fkd(ExportSettings(store.path, tmp_path / "out"), told.append)
    assert any("'blue' is class 0 to it and 2 in the labels" in line for line in told)
    told.clear()
    export_fkd(ExportSettings(write_store(data, tmp_path / "sorted").path, tmp_path / "sorted-out"), told.append)
    assert not any("numbers classes" in line for line in told)


def test_a_foreign_folder_is_left_alone_and_an_own_one_written_again(data: Path, tmp_path: Path) -> None:
    store = write_store(data, tmp_path / "store")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="mine: is not empty; give a new or empty folder"):
        export_fkd(ExportSettings(store.path, tmp_path / "mine"), lambda _: None)
    settings = ExportSettings(store.path, tmp_path / "out")
    export_fkd(settings, lambda _: None)
    before = files_of(tmp_path / "out")
    marker = tmp_path / "out/ferkd-export.json"
    marker.write_text(marker.read_text().replace('"done": true', '"done": false'))
    (tmp_path / "out/train/red/0.tar").write_bytes(b"half")
    export_fkd(settings, lambda _: None)
    assert files_of(tmp_path / "out") == before
    with pytest.raises(InputError, match="out: holds another export"):
        export_fkd(ExportSettings(store.path, tmp_path / "out", policy=POLICY), lambda _: None)


def test_the_command_says_which_flags_fkds_script_needs(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_store(data, tmp_path / "store", k=3)
    main(["export", "fkd", str(store.path), str(tmp_path / "out"), "--discard-below", "0.5", "--num-crops", "2", "--json"])
    said = capsys.readouterr()
    assert f"--softlabel_path {tmp_path / 'out'} --soft_label_type ori --num_classes 3 --num_crops 2" in said.err
    counted = json.loads(said.out)
    assert counted["regions"]["discarded"] > 0
    assert counted["images"] + counted["left_out"] == len(store)


def test_an_export_whose_photographs_went_away_keeps_what_it_wrote(data: Path, tmp_path: Path) -> None:
    photos = Path(shutil.copytree(data, tmp_path / "data"))
    store = write_store(photos, tmp_path / "store")
    settings = ExportSettings(store.path, tmp_path / "fkd", data=photos)
    export_fkd(settings, lambda _: None)
    written = files_of(tmp_path / "fkd")
    assert len(written) >= len(store)
    photos.rename(tmp_path / "gone")
    (photos / "train").mkdir(parents=True)
    with pytest.raises(InputError, match=r"is no longer there as it was; bring it back .*: what is written so far is kept"):
        export_fkd(settings, lambda _: None)
    assert {name for name in files_of(tmp_path / "fkd") if name.endswith(".tar")} == {name for name in written if name.endswith(".tar")}
