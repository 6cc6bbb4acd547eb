"""Ensembles: another teacher labels a store's very crops, and stores over the same crops are averaged."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fkd_files import fkd_labels, write_fkd
from photos import COLOURS, write_photos, write_store
from PIL import Image
from small_stores import files_of, make_store, small_plan
from sources import write_shards

from ferkd.cli import main
from ferkd.crops import CropSettings, draw_crops, take_crop
from ferkd.errors import InputError, StoreError
from ferkd.interop.fkd import FkdSettings, convert_fkd, generator_name
from ferkd.labeling import LabelSettings, label
from ferkd.merge import MergeSettings, average, merge
from ferkd.sources import labelled_photos, read_photo, scan_split
from ferkd.sources.folders import FolderPhotos
from ferkd.store import LabelStore, PathTable
from ferkd.teacher import load_teacher

TEACHER = "python:photos:colour_teacher"


def merged(*stores: Path, **changes: object) -> LabelStore:
    return merge(MergeSettings(stores, **changes), lambda _: None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "data", train=4)


# ---- Averages


def dense(ids: np.ndarray, probs: np.ndarray, classes: int) -> np.ndarray:
    """Labels [M, C] with the tail spread evenly; repeated classes add."""
    exact = probs.astype(np.float64)
    rows = np.repeat(np.maximum(0, 1 - exact.sum(1, keepdims=True)) / max(classes - ids.shape[1], 1), classes, 1)
    for row, (numbers, values) in enumerate(zip(ids, exact, strict=True)):
        for number in set(numbers.tolist()):
            rows[row, number] = values[numbers == number].sum()
    return rows


@pytest.mark.parametrize(("classes", "ks"), [(20, (3, 3)), (20, (2, 5, 4)), (4, (4, 1)), (70_000, (5, 5))])
def test_an_average_is_the_mean_distributions_best(classes: int, ks: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    answers = []
    for k in ks:
        ids = np.stack([random.choice(min(classes, 30), k, replace=False) for _ in range(50)])
        answers.append((ids, np.sort(random.dirichlet(np.full(k + 1, 0.4), 50)[:, :k], 1)[:, ::-1].astype(np.float32)))
    ids, probs = average(answers, classes, max(ks))
    mean = np.mean([dense(*answer, classes) for answer in answers], 0)
    np.testing.assert_allclose(probs, np.take_along_axis(mean, ids, 1), atol=1e-12)
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    named = np.zeros(mean.shape, bool)
    for answer, _ in answers:
        np.put_along_axis(named, answer, True, 1)
    np.testing.assert_allclose(probs, np.sort(np.where(named, mean, 0), 1)[:, : -max(ks) - 1 : -1], atol=1e-12)


def test_a_class_named_twice_counts_once_with_its_sum() -> None:
    answers = [
        (np.array([[4, 4, 7]]), np.array([[0.5, 0.25, 0.125]], np.float32)),
        (np.array([[7, 1, 2]]), np.array([[1, 0, 0]], np.float32)),
    ]
    ids, probs = average(answers, 10, 3)
    assert ids[0, :2].tolist() == [7, 4]
    np.testing.assert_allclose(probs[0, :2], [(0.125 + 1) / 2, 0.75 / 2])


def test_one_store_twice_is_the_same_store(data: Path, tmp_path: Path) -> None:
    store = write_store(data, tmp_path / "a", k=2)
    out = merged(store.path, store.path, tmp_path / "out")
    for image in range(len(store)):
        before, after = store.read(image), out.read(image)
        assert after.label_words.tolist() == before.label_words.tolist()
        assert after.box_words.tolist() == before.box_words.tolist()  # type: ignore[union-attr]
        assert (after.target, after.width, after.height, after.photo_crc) == (before.target, before.width, before.height, before.photo_crc)
    assert [source["manifest_sha256"] for source in out.manifest.provenance["merged_from"]] == [store.manifest_sha256] * 2


@pytest.mark.parametrize(("codecs", "expected"), [("ee", ("stored", "half")), ("ec", ("stored", "half")), ("cc", ("replayed", "packed"))])
def test_layouts_may_differ(tmp_path: Path, codecs: str, expected: tuple[str, str]) -> None:
    kinds = {"e": {"box_codec": "stored", "label_codec": "half"}, "c": {"box_codec": "replayed", "label_codec": "packed"}}
    plans = [small_plan(images=60, k=k, **kinds[codec]) for k, codec in zip((3, 2), codecs, strict=True)]
    stores = [make_store(tmp_path / f"{i}", plan) for i, plan in enumerate(plans)]
    out = merged(*(store.path for store in stores), tmp_path / "out", topk=2)
    assert (out.box_codec, out.label_codec, out.k) == (*expected, 2)
    assert sorted(out.manifest.failed.values()) == ["image 57 cannot be decoded", "image 7 cannot be decoded"]
    labels = [store.read(9) for store in stores]
    ids, probs = out.unpack(out.read(9).label_words)
    wanted_ids, wanted = average([store.unpack(read.label_words) for store, read in zip(stores, labels, strict=True)], 10, 2)
    np.testing.assert_allclose(probs, wanted, atol=2e-3 if expected[1] == "half" else 2e-2)
    assert (ids[:, 0] == wanted_ids[:, 0]).all()
    assert out.read(9).boxes(np.arange(4))[0].tolist() == labels[0].boxes(np.arange(4))[0].tolist()


def test_an_image_that_one_store_lacks_is_recorded(data: Path, tmp_path: Path) -> None:
    stores = [write_store(data, tmp_path / "a"), write_store(data, tmp_path / "b", unreadable=3)]
    out = merged(stores[0].path, stores[1].path, tmp_path / "out")
    assert out.manifest.failed == {stores[0].paths[3]: "made up to be unreadable"}


def test_what_is_not_over_the_same_crops_is_refused_and_nothing_written(data: Path, tmp_path: Path) -> None:
    first = write_store(data, tmp_path / "first")
    others = {
        "crops an image: 6 there, 12 here": {"crops": 6},
        "classes: 4 there, 3 here": {"classes": ("blue", "green", "red", "x")},
        "class 1 is 'red' there and 'green' here": {"classes": ("blue", "red", "green")},
        r"crop 0 of blue/0.png is \[.*\].* there and \[.*\].* here \(left": {"seed": 1},
        r"crop 0 of blue/0.png is": {"seed": 2, "compact": True},
    }
    for i, (says, changes) in enumerate(others.items()):
        other = write_store(data, tmp_path / f"other{i}", **changes)  # type: ignore[arg-type]
        with pytest.raises(
            InputError, match=f"^{other.path}: cannot be averaged with {first.path}: {says}.*ferkd label --like {first.path}$"
        ):
            merged(first.path, other.path, tmp_path / "out")
    photos = shutil.copytree(data, tmp_path / "data")
    Image.new("RGB", (40, 30)).save(photos / "train/red/1.png")
    with pytest.raises(InputError, match=r"red/1.png: was another photo when it was labelled there"):
        merged(first.path, write_store(photos, tmp_path / "changed").path, tmp_path / "out")
    (photos / "train/red/1.png").rename(photos / "train/red/7.png")
    with pytest.raises(InputError, match=r"image 9 is red/2.png there and red/1.png here"):
        merged(first.path, write_store(photos, tmp_path / "renamed").path, tmp_path / "out")
    (photos / "train/red/7.png").unlink()
    with pytest.raises(InputError, match="images: 11 there, 12 here"):
        merged(first.path, write_store(photos, tmp_path / "fewer").path, tmp_path / "out")
    plans = [small_plan(images=5, box_codec="replayed", crop_settings=CropSettings(seed)) for seed in (1, 2)]
    stores = [make_store(tmp_path / f"drawn{i}", plan) for i, plan in enumerate(plans)]
    with pytest.raises(InputError, match=r"crops were drawn with .*seed=2"):
        merged(stores[0].path, stores[1].path, tmp_path / "out")
    turned = dataclasses.replace(plans[0], provenance={"decoder": {"apply_exif": False}})
    with pytest.raises(InputError, match="EXIF orientation applied: False there, True here"):
        merged(stores[0].path, make_store(tmp_path / "turned", turned).path, tmp_path / "out")
    targets = dataclasses.replace(plans[0], targets=np.arange(5)[::-1])
    with pytest.raises(InputError, match=r"c0/image00000.jpg has class 4 there and 0 here"):
        merged(stores[0].path, make_store(tmp_path / "targets", targets).path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_use(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_store(data, tmp_path / "a")
    with pytest.raises(InputError, match="give two stores or more to average, and last the folder of the new one"):
        merged(store.path, tmp_path / "out")
    with pytest.raises(InputError, match="is one of the stores to average"):
        merged(store.path, store.path, store.path)
    with pytest.raises(InputError, match="topk: 3, but no store has more than 2"):
        merged(store.path, store.path, tmp_path / "out", topk=3)
    with pytest.raises(SystemExit):
        main(["merge", str(store.path), str(tmp_path / "none"), str(tmp_path / "out")])
    assert "none: no such folder" in capsys.readouterr().err
    main(["merge", str(store.path), str(store.path), str(tmp_path / "out"), "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "store": str(tmp_path / "out"),
        "images": 12,
        "crops": 144,
        "classes": 3,
        "k": 2,
        "failed": 0,
    }


def test_an_interrupted_merge_ends_byte_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = [make_store(tmp_path / f"{k}", small_plan(k=k)) for k in (2, 3)]
    paths = [store.path for store in stores]
    merged(*paths, tmp_path / "whole")
    read, reads = LabelStore.read, []

    def failing(self: LabelStore, image: int) -> object:
        reads.append(image)
        if len(reads) > 300 + 200:  # all were read once to be compared
            raise StoreError("the disk went away")
        return read(self, image)

    monkeypatch.setattr(LabelStore, "read", failing)
    with pytest.raises(StoreError, match="the disk went away"):
        merged(*paths, tmp_path / "out")
    monkeypatch.setattr(LabelStore, "read", read)
    assert not (tmp_path / "out/manifest.json").exists()
    merged(*paths, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


# ---- Labelling another store's crops


def label_like(data: Path, like: Path, out: Path, **changes: object) -> LabelStore:
    settings = LabelSettings(data, TEACHER, out, like=like, batch_size=16, skip_preflight=True, **changes)  # type: ignore[arg-type]
    store = label(settings, lambda _: None)
    assert store is not None
    return store


def agrees_with_teacher(store: LabelStore, data: Path, image: int) -> bool:
    """Whether the labels are the teacher's answers for exactly the stored boxes."""
    teacher = load_teacher(TEACHER)
    labels = store.read(image)
    photo, _ = read_photo(FolderPhotos(data / "train"), labels.path, apply_exif=store.exif_applied)
    for box, flip, ids in zip(*labels.boxes(np.arange(store.crops)), store.unpack(labels.label_words)[0], strict=True):
        pixels = take_crop(photo, box, flip, 16, "bilinear")
        if int(teacher.model(pixels[None] / 255).argmax()) != ids[0]:
            return False
    return True


@pytest.mark.parametrize("compact", [False, True])
def test_another_teacher_labels_the_same_crops(data: Path, tmp_path: Path, compact: bool) -> None:
    first = write_store(data, tmp_path / "first", seed=5, compact=compact)
    second = label_like(data, first.path, tmp_path / "second", topk=2)
    assert (second.box_codec, second.label_codec) == ("replayed" if compact else "stored", "half")
    assert second.manifest.provenance["like"] == first.manifest_sha256
    for image in range(len(first)):
        (boxes, flips), (others, other_flips) = (store.read(image).boxes(np.arange(12)) for store in (first, second))
        assert boxes.tolist() == others.tolist()
        assert flips.tolist() == other_flips.tolist()
        assert agrees_with_teacher(second, data, image)
    assert len(merged(first.path, second.path, tmp_path / "out")) == 12


def test_converted_crops_are_labelled_as_their_makers_saw_them(tmp_path: Path) -> None:
    data = write_photos(tmp_path / "data", train=2)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((30, 60, 3), np.uint8)
    pixels[:, :30], pixels[:, 30:] = COLOURS["red"], COLOURS["blue"]
    Image.fromarray(pixels).save(data / "train/red/0.png", exif=exif)
    split = scan_split(data, "train")
    for image, path in enumerate(split.paths):
        size = Image.open(split.photos.root / path).size
        boxes, flips = draw_crops(CropSettings(9), image, np.arange(8), *size)
        write_fkd(tmp_path / "fkd" / generator_name(path), boxes, flips, fkd_labels(np.full((8, 3), 1 / 3), "hard"), size)
    first = convert_fkd(FkdSettings(tmp_path / "fkd", tmp_path / "first", data), lambda _: None)
    second = label_like(data, first.path, tmp_path / "second", layout="compact")
    assert (second.box_codec, second.label_codec, second.exif_applied) == ("stored", "packed", False)
    for image in range(len(second)):
        assert second.read(image).box_words.tolist() == first.read(image).box_words.tolist()  # type: ignore[union-attr]
        assert agrees_with_teacher(second, data, image)
    assert (second.entry(4).width, second.entry(4).height) == (60, 30)
    assert len(merged(first.path, second.path, tmp_path / "out")) == 6


def test_only_the_other_stores_images_are_labelled(data: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(photos / "train/green")
    (photos / "train/green").mkdir()
    shutil.copy(data / "train/green/2.png", photos / "train/green/2.png")
    first = write_store(photos, tmp_path / "first", unreadable=1)
    second = label_like(data, first.path, tmp_path / "second")
    assert list(second.paths) == list(first.paths)
    assert second.targets.tolist() == first.targets.tolist()
    assert second.manifest.failed == {first.paths[1]: "made up to be unreadable"}


def test_like_refuses_what_would_not_be_the_same_crops(data: Path, tmp_path: Path) -> None:
    first = write_store(data, tmp_path / "first")
    for name, value in (("crops", 7), ("limit", 3), ("seed", 4), ("flip", False), ("scale", (0.5, 1.0))):
        with pytest.raises(InputError, match=f"{name}: --like .* decides it; leave it out"):
            label_like(data, first.path, tmp_path / "out", **{name: value})
    photos = shutil.copytree(data, tmp_path / "data")
    Image.new("RGB", (40, 30)).save(photos / "train/red/1.png")
    with pytest.raises(InputError, match=r"red/1.png: is not the photo that .*first was made of"):
        label_like(photos, first.path, tmp_path / "out1")
    (photos / "train/red/1.png").unlink()
    with pytest.raises(InputError, match=r"train: lacks red/1.png, which .*first has labels of"):
        label_like(photos, first.path, tmp_path / "out2")
    other = write_store(data, tmp_path / "four", classes=("blue", "green", "red", "x"))
    with pytest.raises(InputError, match="has 4 classes and the teacher 3; labels of different classes cannot be merged"):
        label_like(data, other.path, tmp_path / "out3")
    other = write_store(data, tmp_path / "order", classes=("red", "green", "blue"))
    with pytest.raises(InputError, match="folder 'blue' is class 2 in it and 0 to this teacher"):
        label_like(data, other.path, tmp_path / "out4")
    second = write_store(data, tmp_path / "second", k=1)
    label_like(data, first.path, tmp_path / "out5")
    with pytest.raises(StoreError, match=r"another labelling job: provenance.like"):
        label_like(data, second.path, tmp_path / "out5")


def test_a_hostile_index_reaches_no_file_outside(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a path below the dataset's folder"):
        PathTable.from_paths(["../../etc/passwd"])
    store = write_store(data, tmp_path / "store")
    index = tmp_path / "store/index.bin"
    changed = index.read_bytes().replace(b"blue/0.png", b"../../0.pn")
    index.write_bytes(changed)
    for command in (["label", "--data", data, "--teacher", TEACHER, "--out", tmp_path / "out", "--like", store.path, "--skip-preflight"],
                    ["merge", store.path, store.path, tmp_path / "out"], ["export", "fkd", store.path, tmp_path / "out"]):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            main([str(part) for part in command])
        assert stopped.value.code == 2
    assert not (tmp_path / "0.tar").exists()
    assert not list(tmp_path.glob("out/**/*.tar"))


def test_an_ensemble_of_tar_shards_is_one_of_tar_shards(data: Path, tmp_path: Path) -> None:
    shards = f"wds:{write_shards(data, tmp_path / 'shards')}"
    first = LabelSettings(shards, TEACHER, tmp_path / "first", crops=4, topk=2, skip_preflight=True)
    label(first, lambda _: None)
    label(dataclasses.replace(first, out=tmp_path / "second", crops=200, like=tmp_path / "first"), lambda _: None)
    both = merged(tmp_path / "first", tmp_path / "second", tmp_path / "both")
    assert both.manifest.provenance["source"] == LabelStore(tmp_path / "first").manifest.provenance["source"]
    assert len(labelled_photos(shards, both).read(both.entry(0).path)) > 0
    with pytest.raises(StoreError, match="tar shards"):
        labelled_photos(data, both)
