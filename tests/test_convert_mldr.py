"""ml-dr's reinforced datasets into a store: numbers to images, boxes and flips, labels; other augmentations and shifted numbers refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import COLOURS, write_photos
from PIL import Image

from ferkd.cli import main
from ferkd.crops import CropSettings, draw_crops
from ferkd.errors import InputError
from ferkd.interop.mldr import MlDrSettings, convert_mldr, numbers_in_imagefolder
from ferkd.sources import scan_split
from ferkd.store import LabelStore

CLASSES, CROPS, K = 3, 5, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "data", train=4)


def write_mldr(data: Path, folder: Path, compress: bool = True, flip: bool = True, **more: object) -> Path:
    """A reinforced set of data/train, as ml-dr writes it; `more` are further augmentations of its config."""
    split = scan_split(data, "train")
    number_of = numbers_in_imagefolder(split)
    folder.mkdir()
    steps = {"uint8": {"enable": True}, "random_resized_crop": {"enable": True, "size": 224}, "to_tensor": {"enable": True}}
    steps |= {"random_horizontal_flip": {"enable": True, "p": 0.5}} if flip else {}
    steps |= {"normalize": {"mean": [0.5] * 3, "std": [0.5] * 3}, **more}
    config = {
        "dataset": "imagenet", "num_classes": CLASSES, "gpu": None, "seed": None, "teacher": {"name": "two", "timm_ensemble": True},
        "reinforce": {"num_samples": CROPS, "topk": K, "compress": compress, "image_augmentation": steps},
    }  # fmt: skip
    torch.save(config, folder / "config.pth.tar")
    for image, path in enumerate(split.paths):
        with Image.open(split.photos.root / path) as photo:
            boxes, flips = draw_crops(CropSettings(5), image, np.arange(CROPS), *photo.size)
        ids, probs = answers(image)
        samples = []
        for (left, top, width, height), flipped, row, values in zip(boxes.tolist(), flips.tolist(), ids, probs, strict=True):
            box = (top, left, height, width)
            if compress:
                params: object = [box, *([flipped] if flip else [])]
            else:  # pairs: the second is of the image that ml-dr could mix with
                params = {"uint8": ((), ()), "random_resized_crop": (box, (0, 0, 1, 1)), "random_horizontal_flip": (flipped, not flipped)}
            samples.append({"params": params, "prob": (values.tolist(), row.tolist())})
        torch.save((int(number_of[image]), samples), folder / f"{number_of[image]}.pth.tar", pickle_protocol=4)
    return folder


def answers(image: int) -> tuple[np.ndarray, np.ndarray]:
    """ids [M, 2] and probabilities [M, 2] in rising order: ml-dr does not sort."""
    random = np.random.default_rng(image)
    ids = np.argsort(random.random((CROPS, CLASSES)), 1)[:, :K]
    return ids, np.sort(random.dirichlet(np.ones(K + 1), CROPS)[:, :K], 1).astype(np.float32)


def convert(source: Path, store: Path, data: Path, told: list[str] | None = None, **changes: object) -> LabelStore:
    return convert_mldr(MlDrSettings(source, store, data, **changes), [].append if told is None else told.append)  # type: ignore[arg-type]


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("flip", [True, False])
def test_boxes_flips_and_labels_are_kept(data: Path, tmp_path: Path, compress: bool, flip: bool) -> None:
    source = write_mldr(data, tmp_path / "source", compress, flip)
    store = convert(source, tmp_path / "store", data)
    assert (len(store), store.crops, store.k, store.class_names) == (12, CROPS, K, tuple(sorted(COLOURS)))
    assert (store.box_codec, store.label_codec, store.exif_applied) == ("stored", "half", False)
    assert store.manifest.provenance["converted_from"]["teacher"] == "name=two, timm_ensemble=True"
    for image in range(len(store)):
        labels = store.read(image)
        boxes, flips = labels.boxes(np.arange(CROPS))
        wanted, wanted_flips = draw_crops(CropSettings(5), image, np.arange(CROPS), labels.width, labels.height)
        assert boxes.tolist() == wanted.tolist()
        assert flips.tolist() == (wanted_flips.tolist() if flip else [False] * CROPS)
        ids, probs = store.unpack(labels.label_words)
        expected_ids, expected = answers(image)
        assert ids.tolist() == expected_ids[:, ::-1].tolist()
        np.testing.assert_array_equal(probs, expected[:, ::-1].astype(np.float16))


def test_images_are_numbered_as_torchvision_numbers_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    for path in (
        "a b/x.png",
        "a/x.png",
        "a/sub/y.png",
        "a/sub b/z.png",
        "a.b/x.png",
        "Z/ö.png",
        "Z/o.png",
        "dög/1.png",
        "a/10.png",
        "a/9.PNG",
    ):
        file = tmp_path / "data/train" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
    split = scan_split(tmp_path / "data", "train")
    theirs = [os.path.relpath(path, split.photos.root) for path, _ in datasets.ImageFolder(split.photos.root).samples]
    ours = numbers_in_imagefolder(split)
    assert [split.paths[int(image)] for image in np.argsort(ours)] == theirs
    assert theirs != list(split.paths)


@pytest.mark.parametrize("step", ["rand_augment", "random_erase", "mixup", "cutmix", "resize", "center_crop"])
def test_other_augmentations_are_refused_by_name(data: Path, tmp_path: Path, step: str) -> None:
    source = write_mldr(data, tmp_path / "source", **{step: {"enable": True, "p": 0.5}})
    with pytest.raises(InputError, match=f"uses {step}; a store holds crops and flips only"):
        convert(source, tmp_path / "store", data)
    source = write_mldr(data, tmp_path / "off", **{step: {"enable": False}})
    assert len(convert(source, tmp_path / "store", data)) == 12


def test_a_set_of_more_or_fewer_images_is_refused(data: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(data, tmp_path / "data")
    source = write_mldr(photos, tmp_path / "source")
    removed = photos / "train/blue/0.png"
    kept = removed.read_bytes()
    removed.unlink()
    with pytest.raises(InputError, match=r"labels of 12 images, and the dataset has 11\..*one image more or less would shift"):
        convert(source, tmp_path / "store", photos, allow_failures=True)
    # One photo gone and another added: as many images, other numbers.
    (photos / "train/red/9.png").write_bytes(kept)
    with pytest.raises(InputError, match=r"a crop reaches outside its photo of .* an image was added or removed"):
        convert(source, tmp_path / "store", photos, allow_failures=True)


def test_missing_and_damaged_files(data: Path, tmp_path: Path) -> None:
    source = write_mldr(data, tmp_path / "source")
    (source / "7.pth.tar").unlink()
    with pytest.raises(InputError, match=r"no labels for 1 of 12 images \(7.pth.tar \(green/3.png\): no such file\)"):
        convert(source, tmp_path / "store", data)
    (source / "2.pth.tar").rename(source / "7.pth.tar")
    shutil.copy(source / "1.pth.tar", source / "2.pth.tar")
    number, samples = torch.load(source / "4.pth.tar", weights_only=False)
    torch.save((number, samples[:3]), source / "4.pth.tar")
    number, samples = torch.load(source / "5.pth.tar", weights_only=False)
    samples[0]["prob"] = (samples[0]["prob"][0][:1], samples[0]["prob"][1])
    torch.save((number, samples), source / "5.pth.tar")
    number, samples = torch.load(source / "6.pth.tar", weights_only=False)
    samples[1]["params"] = [(0.5, 0, 1, 1), True]
    torch.save((number, samples), source / "6.pth.tar")
    store = convert(source, tmp_path / "store", data, allow_failures=True)
    reasons = {path: reason.partition(": ")[2][:36] for path, reason in store.manifest.failed.items()}
    assert reasons == {
        "blue/2.png": "says that it is of image 1: it was r",
        "green/0.png": "has 3 crops, others 5; a store has a",
        "green/1.png": "is not ml-dr's (number, samples of p",
        "green/2.png": "its crops are not (top, left, height",
        "green/3.png": "says that it is of image 2: it was r",
    }
    with pytest.raises(InputError, match=r"^2.pth.tar: says that it is of image 1.*--allow-failures$"):
        convert(source, tmp_path / "store2", data)


def test_nested_lists_are_not_unfolded(data: Path, tmp_path: Path) -> None:
    source = write_mldr(data, tmp_path / "source")
    number, samples = torch.load(source / "5.pth.tar", weights_only=False)
    bomb: list[object] = [0.5]
    for _ in range(40):
        bomb = [bomb, bomb]  # 2**40 numbers, if anything walked through them
    samples[0]["prob"] = (bomb, samples[0]["prob"][1])
    torch.save((number, samples), source / "5.pth.tar")
    store = convert(source, tmp_path / "store", data, allow_failures=True)
    assert list(store.manifest.failed) == ["green/1.png"]


class Touch:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("name", ["config.pth.tar", "0.pth.tar", "9.pth.tar"])
def test_hostile_files_stop_the_conversion_with_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    source = write_mldr(data, tmp_path / "source")
    torch.save((9, [Touch(tmp_path / "was-run")]), source / name, pickle_protocol=4)
    with pytest.raises(SystemExit) as stopped:
        main(["convert", "ml-dr", str(source), str(tmp_path / "store"), "--data", str(data), "--allow-failures"])
    assert stopped.value.code == 2
    assert f"{name}: its pickle wants 'posix.system' imported" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "was-run").exists()


def test_what_is_no_reinforced_set_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config.pth.tar: no such file; give the unpacked folder"):
        convert(tmp_path / "empty", tmp_path / "store", data)
    torch.save([1], tmp_path / "empty/config.pth.tar")
    with pytest.raises(InputError, match="does not describe a reinforced dataset"):
        convert(tmp_path / "empty", tmp_path / "store", data)
    source = write_mldr(data, tmp_path / "source")
    for change, says in (({"crops": 6}, r"crops: 6, but 0.pth.tar has 5"), ({"topk": 3}, r"topk: 3, but 0.pth.tar has 2")):
        with pytest.raises(InputError, match=says):
            convert(source, tmp_path / "store", data, **change)
    store = convert(source, tmp_path / "store", data, crops=3, topk=1)
    assert (store.crops, store.k) == (3, 1)
    assert store.unpack(store.read(2).label_words)[0].tolist() == answers(2)[0][:3, 1:].tolist()
