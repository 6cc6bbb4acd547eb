"""FKD's files into a store: every type, to the pixel and to float16; what does not fit is refused or recorded by name, never guessed."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fkd_files import CLASSES, CROPS, FKD_TYPES, distributions, fkd_labels, read_as_fkd, write_fkd, write_labels
from photos import COLOURS, write_photos
from PIL import Image
from small_stores import files_of

import ferkd.interop.conversion
import ferkd.interop.fkd
from ferkd.cli import main
from ferkd.crops import CropSettings, draw_crops
from ferkd.errors import InputError, StoreError
from ferkd.interop.fkd import FkdSettings, convert_fkd, generator_name, trainer_name
from ferkd.sources import scan_split
from ferkd.store import LabelStore

NAMES = [*COLOURS, *(f"other {i}" for i in range(CLASSES - 3))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "data", train=4)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("names") / "classes.txt"
    file.write_text("\n".join(NAMES) + "\n")
    return file


def settings(data: Path, source: Path, store: Path, names: Path, **changes: object) -> FkdSettings:
    return FkdSettings(source, store, data, class_names=names, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("label_type", FKD_TYPES)
def test_every_type_keeps_boxes_to_the_pixel_and_probabilities_to_float16(
    data: Path, names: Path, tmp_path: Path, label_type: str, half: bool
) -> None:
    source = write_labels(data, tmp_path / "fkd", label_type, half)
    topk = CLASSES if label_type == "dense" else None
    store = convert_fkd(settings(data, source, tmp_path / "store", names, topk=topk), lambda _: None)
    assert (len(store), store.crops, store.classes, store.box_codec, store.label_codec) == (12, CROPS, CLASSES, "stored", "half")
    assert store.k == {"hard": 1, "smoothing": 1, "marginal_smoothing_k10": 10, "dense": CLASSES}.get(label_type, 5)
    assert not store.exif_applied
    described = store.manifest.provenance["converted_from"]
    assert label_type in described["label_type"].split(" or ")
    assert described["precision"] == ("float16" if half else "float32")
    store.check_integrity()
    for image in range(len(store)):
        labels = store.read(image)
        boxes, flips = labels.boxes(np.arange(CROPS))
        wanted, wanted_flips = draw_crops(CropSettings(3), image, np.arange(CROPS), labels.width, labels.height)
        np.testing.assert_array_equal(boxes, wanted)
        np.testing.assert_array_equal(flips, wanted_flips)
        assert labels.target == NAMES.index(labels.path.split("/")[0])
        ids, probs = store.unpack(labels.label_words)
        dense = distributions(image)
        expected = np.ones((CROPS, 1)) if label_type == "hard" else np.take_along_axis(dense, ids, 1).astype(np.float16)
        np.testing.assert_array_equal(probs, expected.astype(np.float32))
        np.testing.assert_array_equal(ids[:, 0], dense.argmax(1))


def test_the_dense_default_keeps_the_best_five(data: Path, names: Path, tmp_path: Path) -> None:
    source = write_labels(data, tmp_path / "fkd", "dense")
    store = convert_fkd(settings(data, source, tmp_path / "store", names), lambda _: None)
    ids, _ = store.unpack(store.read(5).label_words)
    np.testing.assert_array_equal(ids, np.argsort(-distributions(5), 1)[:, :5])


def test_no_more_classes_are_kept_than_training_takes(data: Path, tmp_path: Path) -> None:
    names = tmp_path / "names"
    names.write_text("\n".join([*COLOURS, *(f"c{i}" for i in range(77))]))
    source = write_labels(data, tmp_path / "fkd", "dense", classes=80)
    with pytest.raises(InputError, match="topk: 65, but a student can be trained on at most 64 classes a crop"):
        convert_fkd(settings(data, source, tmp_path / "store", names, topk=65), lambda _: None)
    assert convert_fkd(settings(data, source, tmp_path / "store", names, topk=64), lambda _: None).k == 64


def test_a_file_larger_than_any_label_is_not_read(data: Path, names: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_labels(data, tmp_path / "fkd", "hard")
    monkeypatch.setattr("ferkd.interop.conversion.MOST_BYTES", 1000)
    with pytest.raises(InputError, match=r"0.tar: is larger than 1,000 bytes, which no image's labels are"):
        convert_fkd(settings(data, source, tmp_path / "store", names), lambda _: None)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_boxes_on_large_photos_are_those_that_fkds_script_cuts(names: Path, tmp_path: Path, half: bool) -> None:
    data = tmp_path / "data"
    random = np.random.default_rng(0)
    for name, size in zip(COLOURS, [(2300, 90), (1500, 1030), (97, 4000)], strict=True):
        folder = data / "train" / name
        folder.mkdir(parents=True)
        Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(folder / "0.png", compress_level=0)
    source = tmp_path / "fkd"
    split, told = scan_split(data, "train"), []
    for image, path in enumerate(split.paths):
        with Image.open(split.photos.root / path) as photo:
            size = photo.size
        boxes, flips = draw_crops(CropSettings(3, ratio=(1 / 4, 4)), image, np.arange(400), *size)
        boxes[:6] = [(0, 0, *size), (size[0] - 1, size[1] - 1, 1, 1), (0, 0, 1, 1), (1, 1, size[0] - 1, size[1] - 1), boxes[6], boxes[7]]
        write_fkd(source / generator_name(path), boxes, flips, fkd_labels(distributions(image, crops=400), "smoothing"), size, half)
    store = convert_fkd(settings(data, source, tmp_path / "store", names), told.append)
    off = 0
    for image in range(3):
        labels = store.read(image)
        size = (labels.width, labels.height)
        script, _, _ = read_as_fkd(source, labels.path, size, "smoothing", CLASSES, weights_only=False)
        left, top, wide, tall = labels.boxes(np.arange(400))[0].T
        cut = np.array(script).clip(max=(*size, *size))  # beyond the photo's edge Pillow would invent a black pixel
        np.testing.assert_array_equal(np.stack([left, top, left + wide, top + tall], 1), cut)
        teacher, _ = draw_crops(CropSettings(3, ratio=(1 / 4, 4)), image, np.arange(400), *size)
        off += int((np.stack([left, top, wide, tall], 1)[6:] != teacher[6:]).any(1).sum())
    warned = [line for line in told if "larger than 1,024 pixels with coordinates in float16" in line]
    assert (off > 0, len(warned)) == (half, int(half))


# ---- Which class, which file


def test_classes_are_the_sorted_folders_unless_told_otherwise(data: Path, tmp_path: Path) -> None:
    source = write_labels(data, tmp_path / "fkd", "hard", classes=3)
    store = convert_fkd(FkdSettings(source, tmp_path / "store", data), lambda _: None)
    assert store.class_names == tuple(sorted(COLOURS))
    wrong = write_labels(data, tmp_path / "wrong", "marginal_smoothing_k5")
    with pytest.raises(
        InputError, match=r"train/blue/0.tar: has 5 probabilities a crop, but there are 3 classes; say how many with --classes"
    ):
        convert_fkd(FkdSettings(wrong, tmp_path / "store2", data), lambda _: None)
    wrong = write_labels(data, tmp_path / "wrong1", "smoothing")
    with pytest.raises(InputError, match=r"train/.*.tar: has class id \d+, but ids run from 0 to 2: say with --classes"):
        convert_fkd(FkdSettings(wrong, tmp_path / "store3", data, allow_failures=True), lambda _: None)
    with pytest.raises(InputError, match=r"classes: 50, but 3 class folders: give --class-names FILE"):
        convert_fkd(FkdSettings(source, tmp_path / "store4", data, classes=50), lambda _: None)


def test_imagenets_order_is_known(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    folders = ("n01440764", "n02102040", "n03888257")
    for folder in folders:
        (tmp_path / "data/train" / folder).mkdir(parents=True)
        Image.new("RGB", (30, 20)).save(tmp_path / "data/train" / folder / f"{folder}_1.JPEG", "JPEG")
        write_fkd(tmp_path / f"fkd/train/{folder}/{folder}_1.tar", np.array([[0, 0, 9, 9]]), np.array([True]), np.array([701]), (30, 20))
    store = convert_fkd(FkdSettings(tmp_path / "fkd", tmp_path / "store", tmp_path / "data", classes=1000), lambda _: None)
    assert store.targets.tolist() == [0, 217, 701]
    assert store.folders["n03888257"] == 701
    assert store.classes == 1000


def test_two_columns_of_two_classes_must_be_named(tmp_path: Path) -> None:
    data = write_photos(tmp_path / "data", train=1)
    shutil.rmtree(data / "train/red")
    source = write_labels(data, tmp_path / "fkd", "smoothing", classes=3)
    for image, path in enumerate(("train/blue/0.tar", "train/green/0.tar")):
        coords, flips, labels = torch.load(source / path, weights_only=False)
        labels[:, 0] = image
        torch.save([coords, flips, labels], source / path)
    with pytest.raises(InputError, match="are `smoothing` or `dense`; say which with --label-type"):
        convert_fkd(FkdSettings(source, tmp_path / "store", data), lambda _: None)
    store = convert_fkd(FkdSettings(source, tmp_path / "store", data, label_type="smoothing"), lambda _: None)
    assert store.unpack(store.read(1).label_words)[0].tolist() == [[1]] * CROPS


@pytest.mark.parametrize(
    ("path", "generator", "trainer"),
    [
        ("n01/n01_7.JPEG", "train/n01/n01_7.tar", "train/n01/n01_7.tar"),
        ("n01/a.b.c.jpg", "train/n01/a.tar", "train/n01/a.tar"),
        ("dr. no/x.jpg", "train/dr. no/x.tar", "train/dr.tar"),
        ("a/b/x.jpg", "train/a/b/x.tar", "a/b/x.tar"),
        ("dög/é x.jpg", "train/dög/é x.tar", "train/dög/é x.tar"),
    ],
)
def test_names_are_cut_as_fkd_cuts_them(path: str, generator: str, trainer: str) -> None:
    assert (generator_name(path), trainer_name(path)) == (generator, trainer)


def test_class_folders_with_dots_spaces_and_unicode(tmp_path: Path) -> None:
    data = tmp_path / "data"
    folders = ["a b", "dög", "v1.0"]
    for folder in folders:
        (data / "train" / folder).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(data / "train" / folder / "x 1.2.png")
    source = write_labels(data, tmp_path / "save/imagenet", "hard", classes=3)
    assert (source / "train/v1.0/x 1.tar").is_file()
    store = convert_fkd(FkdSettings(tmp_path / "save", tmp_path / "store", data), lambda _: None)  # the generator's --save_path
    assert [path.split("/")[0] for path in store.paths] == folders
    (source / "train/v1.0/x 1.tar").rename(source / "train/v1.tar")  # where FKD's training script would look
    again = convert_fkd(FkdSettings(source, tmp_path / "store2", data), lambda _: None)
    assert again.read(2).label_words.tolist() == store.read(2).label_words.tolist()


def test_images_that_share_a_file_are_not_guessed(data: Path, names: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(data, tmp_path / "data")
    source = write_labels(photos, tmp_path / "fkd", "hard")
    shutil.copy(photos / "train/red/1.png", photos / "train/red/1.b.png")
    with pytest.raises(
        InputError, match=r"no labels for 2 of 13 images \(train/red/1.tar: belongs to several images \(red/1.b.png, red/1.png\)"
    ):
        convert_fkd(settings(photos, source, tmp_path / "store", names), lambda _: None)
    store = convert_fkd(settings(photos, source, tmp_path / "store", names, allow_failures=True), lambda _: None)
    assert sorted(store.manifest.failed) == ["red/1.b.png", "red/1.png"]


# ---- What does not fit


def test_images_without_a_file_are_refused_or_recorded(data: Path, names: Path, tmp_path: Path) -> None:
    source = write_labels(data, tmp_path / "fkd", "marginal_smoothing_k5")
    (source / "train/green/2.tar").unlink()
    with pytest.raises(InputError, match=r"no labels for 1 of 12 images \(train/green/2.tar: no such file\); complete .* --allow-failures"):
        convert_fkd(settings(data, source, tmp_path / "store", names), lambda _: None)
    assert not (tmp_path / "store").exists()
    store = convert_fkd(settings(data, source, tmp_path / "store", names, allow_failures=True), lambda _: None)
    assert store.manifest.failed == {"green/2.png": "train/green/2.tar: no such file"}
    for folder in (source / "train").iterdir():
        shutil.rmtree(folder)
    with pytest.raises(InputError, match="has no labels for any of the 12 images"):
        convert_fkd(settings(data, source, tmp_path / "store2", names, allow_failures=True), lambda _: None)


def test_files_without_an_image_are_counted(data: Path, names: Path, tmp_path: Path) -> None:
    source = write_labels(data, tmp_path / "fkd", "hard")
    shutil.copy(source / "train/red/1.tar", source / "train/red/77.tar")
    shutil.copytree(source / "train/red", source / "train/yellow")
    told: list[str] = []
    convert_fkd(settings(data, source, tmp_path / "store", names), told.append)
    assert (
        told[0] == "6 of 18 label files belong to no image and are left out (train/red/77.tar, train/yellow/0.tar, train/yellow/1.tar ...)"
    )


def rewrite(file: Path, **changes: object) -> None:
    coords, flips, labels = torch.load(file, weights_only=False)
    parts = {"coords": coords, "flips": flips, "labels": labels}
    for name, change in changes.items():
        parts[name] = change(parts[name])  # type: ignore[operator]
    torch.save(list(parts.values()), file)


def other_pixels(labels: np.ndarray) -> np.ndarray:
    labels = labels.copy()
    labels[0, 0, 1] = labels[0, 0, 0]
    return labels


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({name: (lambda x: x[:4]) for name in ("coords", "flips", "labels")}, "has 4 crops, others 6; a store has as many of each image"),
        ({"labels": lambda x: x[:4]}, r"labels float32 \(4, 2, 5\) for 6 crops"),
        ({"labels": lambda x: x[:, :, :3]}, r"labels \(6, 2, 3\), others \[crops, 2, 5\]: another type of label"),
        ({"labels": lambda x: x * np.float32(np.nan)}, "has class ids that are no whole numbers"),
        ({"labels": lambda x: x + np.float32([[0], [1]])}, r"has probabilities outside \[0, 1\]"),
        ({"labels": other_pixels}, "names a class twice in one label"),
        ({"coords": lambda x: x + np.float32(0.5)}, "a crop reaches outside its photo of"),
        ({"coords": lambda x: np.full_like(x, np.inf)}, "has coordinates that are no numbers"),
        ({"coords": lambda x: x * np.float32([1, 1, 0, 1])}, "has a crop without pixels"),
        ({"coords": lambda x: x[:, :3]}, ".*where FKD has"),
        ({"coords": lambda x: x.astype(int)}, ".*where FKD has"),
        ({"coords": lambda x: x.tolist()}, r"is not FKD's \[coords, flips, labels\], three arrays"),
        ({"flips": lambda x: None}, r"is not FKD's \[coords, flips, labels\], three arrays"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:30],
)
def test_a_file_that_does_not_fit_is_refused_or_recorded(
    data: Path, names: Path, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    source = write_labels(data, tmp_path / "fkd", "marginal_smoothing_k5")
    rewrite(source / "train/green/1.tar", **changes)
    with pytest.raises(InputError, match=f"^train/green/1.tar: {says}.*; or record such images as failed with --allow-failures$"):
        convert_fkd(settings(data, source, tmp_path / "store", names), lambda _: None)
    store = convert_fkd(settings(data, source, tmp_path / "store", names, allow_failures=True), lambda _: None)
    assert list(store.manifest.failed) == ["green/1.png"]


def test_damaged_files_and_photos(data: Path, names: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(data, tmp_path / "data")
    source = write_labels(photos, tmp_path / "fkd", "marginal_smoothing_k5")
    (photos / "train/blue/1.png").write_bytes(b"")
    whole = (source / "train/blue/0.tar").read_bytes()
    (source / "train/blue/0.tar").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray((source / "train/red/3.tar").read_bytes())
    flipped[flipped.index(b"latin1") - 40] ^= 4
    (source / "train/red/3.tar").write_bytes(flipped)
    with pytest.raises(InputError, match=r"^train/blue/0.tar: is a damaged zip file"):
        convert_fkd(settings(photos, source, tmp_path / "store", names), lambda _: None)
    store = convert_fkd(settings(photos, source, tmp_path / "store", names, allow_failures=True), lambda _: None)
    assert sorted(store.manifest.failed) == ["blue/0.png", "blue/1.png", "red/3.png"]
    assert store.manifest.failed["blue/1.png"] == "0 bytes: the file is empty"
    assert "Bad CRC-32" in store.manifest.failed["red/3.png"]


class Touch:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.file}",)


def test_a_hostile_file_stops_the_conversion_with_one_line(
    data: Path, names: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_labels(data, tmp_path / "fkd", "hard")
    box = io.BytesIO()
    torch.save([Touch(tmp_path / "was-run"), np.zeros(6, bool), np.zeros(6, int)], box)
    (source / "train/red/2.tar").write_bytes(box.getvalue())
    command = ["convert", "fkd", source, tmp_path / "store", "--data", data, "--class-names", names, "--allow-failures"]
    with pytest.raises(SystemExit) as stopped:
        main([str(part) for part in command])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ferkd convert: train/red/2.tar: its pickle wants 'posix.system' imported; ferkd reads arrays only")
    assert not (tmp_path / "was-run").exists()
    assert not (tmp_path / "store/manifest.json").exists()


def test_float16_ids_beyond_2048_are_refused(tmp_path: Path) -> None:
    data = write_photos(tmp_path / "data", train=1)
    names = tmp_path / "names"
    names.write_text("\n".join([*COLOURS, *(f"c{i}" for i in range(3000 - 3))]))
    source = write_labels(data, tmp_path / "fkd", "smoothing", half=True)
    with pytest.raises(InputError, match="class ids as float16, which counts exactly up to 2,048 only, and there are 3,000 classes"):
        convert_fkd(settings(data, source, tmp_path / "store", names, allow_failures=True), lambda _: None)
    source = write_labels(data, tmp_path / "full", "smoothing")
    convert_fkd(settings(data, source, tmp_path / "store2", names), lambda _: None)


def test_photos_of_another_size_are_told(data: Path, names: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(data, tmp_path / "data")
    source = write_labels(photos, tmp_path / "fkd", "hard")
    file = photos / "train/green/3.png"
    with Image.open(file) as photo:
        resized = photo.resize((photo.width * 3 // 5, photo.height * 3 // 5))
    resized.save(file)
    told: list[str] = []
    store = convert_fkd(settings(photos, source, tmp_path / "store", names), told.append)
    assert [line for line in told if line.startswith("WARNING: 1 photos do not have the size they had") and "train/green/3.tar" in line]
    labels = store.read(7)
    script, _, _ = read_as_fkd(source, labels.path, (labels.width, labels.height), "hard", CLASSES, weights_only=False)
    left, top, wide, tall = labels.boxes(np.arange(CROPS))[0].T
    assert np.stack([left, top, left + wide, top + tall], 1).tolist() == [list(box) for box in script]


def test_labels_that_never_agree_with_the_folders_are_told(data: Path, names: Path, tmp_path: Path) -> None:
    told: list[str] = []
    source = write_labels(data, tmp_path / "fkd", "marginal_smoothing_k5")
    convert_fkd(settings(data, source, tmp_path / "right", names), told.append)
    assert not any("WARNING" in line for line in told)
    names = tmp_path / "shuffled.txt"
    names.write_text("\n".join(NAMES[::-1]))
    convert_fkd(settings(data, source, tmp_path / "store", names), told.append)
    assert told[-1].startswith("WARNING: that is little. Is --data the dataset that was labelled")


def test_exif_orientation_is_ignored_as_fkd_ignores_it(names: Path, tmp_path: Path) -> None:
    data = write_photos(tmp_path / "data", train=1)
    for name in COLOURS:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (60, 30), COLOURS[name]).save(data / "train" / name / "0.png", exif=exif)
    source = write_labels(data, tmp_path / "fkd", "hard")
    store = convert_fkd(settings(data, source, tmp_path / "store", names), lambda _: None)
    assert (store.entry(0).width, store.entry(0).height) == (60, 30)


# ---- Fewer crops, interruptions


def test_the_first_crops_can_be_taken(data: Path, names: Path, tmp_path: Path) -> None:
    source = write_labels(data, tmp_path / "fkd", "marginal_smoothing_k10")
    rewrite(source / "train/green/1.tar", **{name: (lambda x: x[:4]) for name in ("coords", "flips", "labels")})
    store = convert_fkd(settings(data, source, tmp_path / "store", names, crops=4, topk=2), lambda _: None)
    assert (store.crops, store.k) == (4, 2)
    ids, probs = store.unpack(store.read(3).label_words)
    assert ids.tolist() == np.argsort(-distributions(3), 1)[:4, :2].tolist()
    np.testing.assert_array_equal(probs, np.sort(distributions(3), 1)[:4, :-3:-1].astype(np.float16))
    for change, says in (({"crops": 7}, "crops: 7, but train/blue/0.tar has 6"), ({"topk": 11}, "topk: 11, but train/blue/0.tar has 10")):
        with pytest.raises(InputError, match=says):
            convert_fkd(settings(data, source, tmp_path / "store2", names, **change), lambda _: None)


def test_an_interrupted_conversion_ends_byte_identical_and_takes_no_other_source(data: Path, names: Path, tmp_path: Path) -> None:
    photos = tmp_path / "data"
    for name in COLOURS:
        (photos / "train" / name).mkdir(parents=True)
        for i in range(50):
            shutil.copy(data / "train" / name / f"{i % 4}.png", photos / "train" / name / f"{i}.png")
    source = write_labels(photos, tmp_path / "fkd", "smoothing")
    whole = convert_fkd(settings(photos, source, tmp_path / "whole", names), lambda _: None)
    spoiled = source / "train/red/20.tar"
    kept = spoiled.read_bytes()
    spoiled.write_bytes(kept[:500] + b"\0" * (len(kept) - 500))  # as large as before
    with pytest.raises(InputError, match=r"train/red/20.tar"):
        convert_fkd(settings(photos, source, tmp_path / "store", names), lambda _: None)
    assert list((tmp_path / "store/shards").glob("*.rows"))
    spoiled.write_bytes(kept)
    other = shutil.copytree(source, tmp_path / "other")
    rewrite(other / "train/blue/0.tar", labels=lambda x: x * np.float32([1, 0.5]))  # another teacher's file of the same size
    with pytest.raises(StoreError, match=r"another labelling job: provenance.converted_from.files_sha256"):
        convert_fkd(settings(photos, other, tmp_path / "store", names), lambda _: None)
    told: list[str] = []
    convert_fkd(settings(photos, source, tmp_path / "store", names), told.append)
    assert any("64 of 150 images are there already" in line for line in told)
    assert files_of(tmp_path / "store") == files_of(whole.path)


def test_photographs_and_labels_that_go_away_meanwhile_are_no_failed_images(
    data: Path, names: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = Path(shutil.copytree(data, tmp_path / "data"))
    source = write_labels(photos, tmp_path / "fkd", "smoothing")
    whole = convert_fkd(settings(photos, source, tmp_path / "whole", names), lambda _: None)
    store = tmp_path / "store"
    for lost, says in (
        (photos, "is no longer there as it was; bring it back and start the same command again: what is converted so far is kept"),
        (source, "bring the labels back and start the same command again"),
    ):
        read = ferkd.interop.conversion.fill_store

        def unplugged(*arguments: Any, lost: Path = lost, read: Any = read) -> LabelStore:
            lost.rename(tmp_path / "gone")
            found: LabelStore = read(*arguments)
            return found

        monkeypatch.setattr(ferkd.interop.conversion, "fill_store", unplugged)
        with pytest.raises(InputError, match=says):
            convert_fkd(settings(photos, source, store, names), lambda _: None)
        monkeypatch.undo()
        (tmp_path / "gone").rename(lost)
    assert files_of(convert_fkd(settings(photos, source, store, names), lambda _: None).path) == files_of(whole.path)
