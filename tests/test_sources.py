"""The same photographs from a folder, from tar shards and from a dataset of Hugging Face: the same labels, the same training."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_inputs import quiet
from photos import write_photos
from sources import images_of, sample_files, write_hub, write_shards, write_tar

from ferkd import CropLoader
from ferkd.labeling import LabelSettings, label
from ferkd.sources import scan_split, source_of
from ferkd.store import LabelStore

TEACHER = "python:photos:colour_teacher"
KINDS = ["wds", "hf"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `photos`, `shards`, `hub` and the labels of each, `labels-folder`, `labels-wds`, `labels-hf`."""
    pytest.importorskip("datasets")
    patch = pytest.MonkeyPatch()
    root = tmp_path_factory.mktemp("sources")
    patch.setenv("FERKD_CACHE", str(root / "cache"))
    patch.syspath_prepend(str(Path(__file__).parent))
    write_photos(root / "photos")
    (root / "photos/train/green/5.png").write_bytes(b"no picture")
    write_shards(root / "photos", root / "shards")
    write_hub(root / "photos", root / "hub")
    for kind in ("folder", *KINDS):
        assert isinstance(label(settings(root, kind), lambda _: None), LabelStore)
    yield root
    patch.undo()


def data_of(root: Path, kind: str) -> str:
    return {"folder": f"{root}/photos", "wds": f"wds:{root}/shards", "hf": f"hf:{root}/hub"}[kind]


def settings(root: Path, kind: str, **changes: Any) -> LabelSettings:
    return LabelSettings(
        **{
            "data": data_of(root, kind),
            "teacher": TEACHER,
            "out": root / f"labels-{kind}",
            "crops": 6,
            "topk": 2,
            "batch_size": 16,
            **changes,
        }
    )


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_those_of_the_same_photographs_in_folders(place: Path, kind: str) -> None:
    folder, other = LabelStore(place / "labels-folder"), LabelStore(place / f"labels-{kind}")
    assert len(folder) == len(other) == 24
    for image in range(len(folder)):
        ours, theirs = folder.read(image), other.read(image)
        assert np.array_equal(ours.label_words, theirs.label_words)
        assert ours.box_words is not None
        assert np.array_equal(ours.box_words, theirs.box_words)
        assert (ours.target, ours.width, ours.height, ours.photo_crc) == (theirs.target, theirs.width, theirs.height, theirs.photo_crc)
    assert dict(folder.folders) == dict(other.folders)
    reasons = list(other.manifest.failed.values())
    assert reasons == list(folder.manifest.failed.values())
    assert len(reasons) == 1
    assert other.manifest.provenance["source"]["kind"] == kind
    assert "source" not in folder.manifest.provenance
    assert str(place) not in (place / f"labels-{kind}/manifest.json").read_text()  # where the data lay is no business of the store's
    first = {"wds": "000.tar/blue/0.png", "hf": "train/000000000"}[kind]
    assert other.entry(0).path == first


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_brings_the_same_batches(place: Path, kind: str, workers: int) -> None:
    """From every source; with workers, which open its files themselves."""
    options: dict[str, Any] = {"size": 16, "batch_size": 12, "epochs": 2, "crops_per_image": 4}
    wanted = list(CropLoader(data_of(place, "folder"), place / "labels-folder", workers=0, **options))
    found = list(CropLoader(data_of(place, kind), place / f"labels-{kind}", workers=workers, **options))
    assert len(found) == len(wanted) > 2
    for ours, theirs in zip(wanted, found, strict=True):
        assert torch.equal(ours.pixels, theirs.pixels)
        assert torch.equal(ours.words, theirs.words)
        assert torch.equal(ours.target, theirs.target)


def _photo(photos: Any, path: str, answer: Any) -> None:
    answer.put(photos.read(path))


@pytest.mark.parametrize("kind", ["folder", *KINDS])
def test_photographs_go_into_other_processes(place: Path, kind: str) -> None:
    """By pickling, as spawned workers get them (where the whole split goes, for training without labels), and by forking."""
    split = scan_split(data_of(place, kind), "train")
    first = split.photos.read(split.paths[0])  # what is open here must not matter there
    assert first == images_of(place / "photos", "train")[0][2]
    pickled = pickle.loads(pickle.dumps(split))
    assert pickled.photos.read(pickled.paths[0]) == first
    assert list(pickled.paths) == list(split.paths)
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=_photo, args=(split.photos, split.paths[7], answer))
    process.start()
    assert answer.get(timeout=60) == images_of(place / "photos", "train")[7][2]
    process.join()


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_takes_it(place: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, labels = data_of(place, kind), str(place / f"labels-{kind}")
    train = ["train", "--data", data, "--student", "python:photos:tiny_net", "--batch-size", "12", "--epochs", "2", "--warmup-epochs", "0"]
    train += ["--workers", "0", "--eval-crop-pct", "1.0"]
    commands = [
        [*train, "--labels", labels, "--out", f"{tmp_path}/run", "--discard-below", "0.2"],
        [*train, "--out", f"{tmp_path}/hard", "--cache", "decoded"],
        [*train, "--out", f"{tmp_path}/online", "--teacher", TEACHER],
        ["eval", "--data", data, "--weights", f"{tmp_path}/run", "--workers", "2"],
        ["verify", labels, "--data", data, "--teacher", TEACHER, "--every-photo"],
        ["inspect", labels, "--data", data, "--page", f"{tmp_path}/page.html"],
        ["report", f"{tmp_path}/run", "--data", data, "--labels", labels, "--out", f"{tmp_path}/report.html"],
        ["label", "--data", data, "--teacher", TEACHER, "--like", labels, "--out", f"{tmp_path}/second"],
        ["merge", labels, f"{tmp_path}/second", f"{tmp_path}/both"],
    ]
    for command in commands:
        status, said = quiet(command)
        assert status == 0, (command, said)
        assert "Traceback" not in said
    for page in ("page", "report"):
        assert (tmp_path / f"{page}.html").read_text().count("data:image/jpeg") > 4
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["val_images"] == 12
    status, said = quiet(["export", "fkd", labels, f"{tmp_path}/fkd"])
    assert status == 2
    assert "was not labelled from a folder" in said
    status, said = quiet(["convert", "fkd", str(tmp_path), f"{tmp_path}/converted", "--data", data])
    assert status == 2
    assert "is no folder; the labels of other people find their photographs by their place in it" in said


@pytest.mark.parametrize(("kind", "other", "what"), [("wds", "folder", r"tar shards \(wds:\)"), ("folder", "hf", "a folder")])
def test_labels_do_not_go_with_another_kind_of_source(place: Path, kind: str, other: str, what: str) -> None:
    """The photographs are the same, but not their names: refused at once, and not as photographs that are missing."""
    with pytest.raises(ValueError, match=rf"was labelled from {what}, and .* is .*give the --data that was labelled"):
        CropLoader(data_of(place, other), place / f"labels-{kind}", size=16, batch_size=12, epochs=1)
    data = data_of(place, other)
    for command in (
        ["verify", str(place / f"labels-{kind}"), "--data", data, "--teacher", TEACHER],
        ["label", "--data", data, "--teacher", TEACHER, "--like", str(place / f"labels-{kind}"), "--out", str(place / "never")],
    ):
        status, said = quiet(command)
        assert status == 2
        assert "give the --data that was labelled" in said


@pytest.mark.parametrize("kind", KINDS)
def test_labelling_that_was_stopped_ends_the_same(place: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ferkd import labeling, shards

    class Killed(Exception):
        pass

    done = []

    def kill(*arguments: Any) -> Any:
        for image in real(*arguments):
            done.append(image)
            if len(done) == 11:
                raise Killed
            yield image

    for module in (labeling, shards):
        monkeypatch.setattr(module, "UNIT_IMAGES", 4)
    real = labeling.label_images
    monkeypatch.setattr(labeling, "label_images", kill)
    again = settings(place, kind, out=tmp_path / "again", skip_preflight=True)
    with pytest.raises(Killed):
        label(again, lambda _: None)
    monkeypatch.setattr(labeling, "label_images", real)
    said: list[str] = []
    label(again, said.append)
    assert any("photos are labelled already" in line for line in said)
    whole = place / f"labels-{kind}"
    for file in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and "policies" not in path.parts):
        assert (tmp_path / "again" / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_is_of_names_and_sizes(place: Path, kind: str) -> None:
    split = scan_split(data_of(place, kind), "train")
    sizes = [len(data) for _, _, data in images_of(place / "photos", "train")]
    assert list(split.photos.sizes(split.paths)) == sizes
    assert split.fingerprint() == scan_split(data_of(place, kind), "train").fingerprint()
    assert split.fingerprint() != scan_split(data_of(place, kind), "val").fingerprint()


def test_a_plain_path_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path / "hub", train=1, val=1)
    monkeypatch.chdir(tmp_path)
    assert source_of("hub").has("val")
    assert source_of(Path("hub")).has("train")
    assert not source_of("hub").has("test")
    assert os.fspath(scan_split("hub", "train").photos.root) == "hub/train"


def test_hard_labels_keep_the_datasets_own_order_and_are_told_from_other_rows(place: Path, tmp_path: Path) -> None:
    from ferkd.task import _identity, _in_order

    images = [(path, ("9", "10", "1")[i % 3], data) for i, (path, _, data) in enumerate(images_of(place / "photos", "train"))]
    write_tar(tmp_path / "train/0.tar", sample_files([image for image in images if image[0] != "green/5.png"]))
    train = scan_split(f"wds:{tmp_path}", "train")
    classes, place_of = _in_order(train)
    assert classes == ("1", "9", "10"), "not by their names, in which 10 comes before 9"
    assert [classes[place_of[i]] for i in range(3)] == list(train.folders)
    one = scan_split(data_of(place, "hf"), "train")
    assert _in_order(one)[0] == ("red", "green", "blue"), "a ClassLabel's"
    other = scan_split(f"hf:{write_hub(write_photos(tmp_path / 'others', seed=1), tmp_path / 'hub')}", "train")
    assert one.paths.sha256() == other.paths.sha256()
    assert _identity(one) != _identity(other)
