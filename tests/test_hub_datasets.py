"""Datasets of Hugging Face: which folders, columns and splits are found, and what is said of others. Local files only."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from photos import write_photos
from sources import hub_rows, images_of

from ferkd.errors import InputError, SourceLost
from ferkd.sources import Split, scan_split
from ferkd.sources.hub import HubDataset

datasets = pytest.importorskip("datasets")
NAMES = ("red", "green", "blue")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "data", train=3, val=2)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def rows(photos: Path) -> Any:
    return hub_rows(photos, "train", NAMES)


def saved(rows: Any, place: Path, **splits: Any) -> str:
    datasets.DatasetDict({"train": rows, **splits}).save_to_disk(str(place))
    return f"hf:{place}"


def contents(split: Split) -> list[tuple[str, bytes]]:
    return [(split.folders[folder], split.photos.read(path)) for path, folder in zip(split.paths, split.folder_of, strict=True)]


def test_parquet_imagefolder_and_save_to_disk_are_read(photos: Path, rows: Any, tmp_path: Path) -> None:
    wanted = [(name, data) for _, name, data in images_of(photos, "train")]
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(str(tmp_path / "parquet/train-00000-of-00001.parquet"))
    hub_rows(photos, "val", NAMES).to_parquet(str(tmp_path / "parquet/test-00000-of-00001.parquet"))
    rows.save_to_disk(str(tmp_path / "one"))
    for data in (f"hf:{tmp_path}/parquet", saved(rows, tmp_path / "disk"), f"hf:{tmp_path}/one", f"hf:{photos}"):
        split = scan_split(data, "train")
        assert contents(split) == wanted, data
        assert split.folders == ("blue", "green", "red")
        assert [split.paths[0], split.paths[8]] == ["train/000000000", "train/000000008"]
        assert list(split.photos.sizes(split.paths)) == [len(data) for _, data in wanted]
    assert len(scan_split(f"hf:{tmp_path}/parquet", "val")) == 6  # test, where there is nothing better
    assert scan_split(f"hf:{tmp_path}/parquet?val=train[:4]", "val").paths[3] == "train[:4]/000000003"
    assert not HubDataset(f"{tmp_path}/one").has("val")


def test_the_class_s_numbers_are_kept(rows: Any, tmp_path: Path) -> None:
    data = saved(rows, tmp_path / "disk")
    named, numbered = scan_split(data, "train"), scan_split(f"{data}?classes=numbers", "train")
    assert named.numbers is not None
    assert numbered.numbers is not None
    assert dict(named.numbers.of) == {"red": 0, "green": 1, "blue": 2}
    assert (named.numbers.count, named.numbers.bare) == (3, False)
    assert (numbered.folders, numbered.numbers.bare) == (("0", "1", "2"), True)


def test_columns_may_be_named(rows: Any, tmp_path: Path) -> None:
    """Two columns of images, classes as texts; a selection of rows in an order of its own."""
    rows = rows.add_column("kind", ["ab"[i % 2] for i in range(9)]).remove_columns("label").select([8, 0, 3])
    encoded = rows.cast_column("image", datasets.Image(decode=False))["image"][:]
    data = saved(rows.add_column("second", encoded).cast_column("second", datasets.Image()), tmp_path / "disk")
    split = scan_split(f"{data}?image=second&label=kind", "train")
    assert [name for name, _ in contents(split)] == ["a", "a", "b"]
    assert split.numbers is None
    with pytest.raises(InputError, match=r"has 2 columns of images \('image', 'second'\); say which with \?image=COLUMN"):
        scan_split(f"{data}?label=kind", "train")
    with pytest.raises(InputError, match=r"has no columns of classes; say which with \?label=COLUMN: there are 'image', 'note', 'kind'"):
        scan_split(f"{data}?image=image", "train")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?image=nope", r"has no column 'nope', only 'image', 'label', 'note'"),
        ("?label=nope", r"has no column 'nope'"),
        ("?image=label", r"its column 'label' holds no images"),
        ("?label=image", r"its column 'image' holds struct.*a class is a number or a text"),
        ("?train=nope", r"has no split nope, only 'train'; say which with \?train=SPLIT"),
        ("?train=nope[:4]", r"its split .*|cannot be loaded"),
        ("?colour=red", r"says 'colour' after its question mark; it may say image=, label="),
        ("?image=", r"says 'image' after"),
        ("?", r"says '' after"),
        ("?classes=names", r"after its question mark"),
    ],
)
def test_a_wrong_option_is_one_line(rows: Any, tmp_path: Path, query: str, message: str) -> None:
    data = saved(rows, tmp_path / "disk")
    with pytest.raises(InputError, match=message) as caught:
        scan_split(f"{data}{query}", "train")
    assert "\n" not in str(caught.value)


def test_rows_without_class_or_image(rows: Any, tmp_path: Path) -> None:
    without = rows.cast_column("label", datasets.Value("int64")).map(lambda row, i: {"label": -1 if i < 2 else 1}, with_indices=True)
    with pytest.raises(InputError, match=r"2 of 9 rows have no class \(label is -1\), as test sets do; name a split that has them"):
        scan_split(saved(without, tmp_path / "minus"), "train")
    nothing = rows.map(lambda row, i: {"label": None if i < 3 else 1}, with_indices=True)
    with pytest.raises(InputError, match=r"3 of 9 rows have no 'label'"):
        scan_split(saved(nothing, tmp_path / "none"), "train")
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(str(tmp_path / "parquet/train.parquet"))
    with pytest.raises(InputError, match=r"train\[:0\].* no (rows|data)"):
        scan_split(f"hf:{tmp_path}/parquet?train=train[:0]", "train")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    odd_rows = datasets.Dataset.from_dict({"image": [None, {"bytes": b"", "path": None}], "label": ["a", "b"]}, features=features)
    odd = scan_split(saved(odd_rows, tmp_path / "odd"), "train")
    for row, message in ((0, "there is no image in the row"), (2, "there is no such row")):
        with pytest.raises(InputError, match=f"{row}: cannot be read: {message}"):
            odd.photos.read(f"train/{row:09d}")
    assert odd.photos.read("train/000000001") == b""
    assert list(odd.photos.sizes(odd.paths)) == [0, 0]
    assert "train/2" not in odd.photos
    assert "test/000000001" not in odd.photos


def test_files_beside_the_rows_that_go_away(tmp_path: Path) -> None:
    """An imagefolder's rows point to files: one that is gone is an unreadable photograph; a folder that is gone is not their fault."""
    data = write_photos(tmp_path / "data", train=2, val=1)
    split = scan_split(f"hf:{data}", "train")
    (data / "train/blue/0.png").unlink()
    with pytest.raises(InputError, match=r"train/000000000: cannot be read: No such file") as caught:
        split.photos.read("train/000000000")
    assert not isinstance(caught.value, SourceLost)
    assert next(iter(split.photos.sizes(split.paths))) == 0
    data.rename(tmp_path / "unplugged")
    with pytest.raises(SourceLost) as lost:
        split.photos.read("train/000000001")
    assert lost.value.place == f"{data}/train/blue"


def test_what_is_no_dataset_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"hf:.*/nowhere: no such folder"):
        scan_split(f"hf:{tmp_path}/nowhere", "train")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/dataset_dict.json").write_text("{")
    for name in ("empty", "broken"):
        with pytest.raises(InputError, match=rf"hf:.*/{name}: cannot be loaded: ") as caught:
            scan_split(f"hf:{tmp_path}/{name}", "train")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"hf://datasets/org/birds: is the place of files; a dataset is named hf:OWNER/NAME"):
        scan_split("hf://datasets/org/birds", "train")
    with pytest.raises(InputError, match="names no dataset"):
        scan_split("hf:@main", "train")


def test_names_of_the_hub(monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
    """What is asked of the library, for want of a network: the name, the configuration, the revision; the commit is recorded."""
    asked: list[Any] = []
    rows.info.download_checksums = {f"hf://datasets/org/birds@{'c0ffee' + '0' * 34}/data/train.parquet": {}}

    def load(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return datasets.DatasetDict({"train": rows, "validation": rows})

    monkeypatch.setattr(datasets, "load_dataset", load)
    split = scan_split("hf:org/birds@v2?config=small", "val")
    assert asked == [(("org/birds", "small"), {"revision": "v2"})]
    assert split.photos.described() == {
        "kind": "hf", "name": "org/birds", "config": "small", "revision": "c0ffee" + "0" * 34, "split": "validation", "image": "image",
    }  # fmt: skip
    assert str(split) == "hf:org/birds@v2 (validation)"


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'ferkd\[datasets\]'"):
        scan_split("hf:org/birds", "train")
