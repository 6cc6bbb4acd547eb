"""A folder of photographs as arrays, and what each class of a dataset means to a teacher."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from ferkd.classes import ClassNumbers, class_mapping
from ferkd.errors import InputError
from ferkd.sources import check_same_classes, scan_split


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * len(path))
    return root


def test_images_are_listed_sorted_with_their_class(tmp_path):
    touch(tmp_path, "train/cat/b.JPG", "train/cat/sub/a.png", "train/cat b/z.webp", "train/dog/x.jpeg")
    touch(tmp_path, "train/dog/notes.txt", "train/dog/.hidden.jpg", "train/.cache/a.jpg")
    split = scan_split(tmp_path, "train")
    assert [split.paths[i] for i in range(len(split))] == ["cat b/z.webp", "cat/b.JPG", "cat/sub/a.png", "dog/x.jpeg"]
    assert split.folders == ("cat", "cat b", "dog")
    assert split.folder_of.dtype == np.int32
    assert [split.folders[f] for f in split.folder_of] == ["cat b", "cat", "cat", "dog"]
    assert split.photos.root == tmp_path / "train"


def test_symbolic_links_are_followed_and_cycles_refused(tmp_path):
    touch(tmp_path, "elsewhere/a.jpg", "train/dog/b.jpg")
    (tmp_path / "train/dog/more").symlink_to(tmp_path / "elsewhere")
    assert [scan_split(tmp_path, "train").paths[i] for i in range(2)] == ["dog/b.jpg", "dog/more/a.jpg"]
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "train/dog")
    with pytest.raises(InputError, match="leads back to a folder above"):
        scan_split(tmp_path, "train")


def test_a_dangling_link_is_named(tmp_path):
    touch(tmp_path, "train/dog/b.jpg")
    (tmp_path / "train/dog/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(InputError, match=r"gone\.jpg: a symbolic link to nothing"):
        scan_split(tmp_path, "train")


def test_names_with_unicode_spaces_and_dots_survive(tmp_path):
    touch(tmp_path, "train/été 1.5/ä ö.v2.jpg", "train/犬/猫.png")
    split = scan_split(tmp_path, "train")
    assert split.paths[0] == "été 1.5/ä ö.v2.jpg"
    assert split.paths.index_of("犬/猫.png") == 1


def test_a_name_that_is_no_utf8_is_refused(tmp_path):
    touch(tmp_path, "train/dog/b.jpg")
    with open(os.fsencode(tmp_path / "train/dog") + b"/\xff.jpg", "wb"):
        pass
    with pytest.raises(InputError, match="not UTF-8"):
        scan_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["readme"], "train: no such folder; put the photographs in"),
        (["train/notes.txt"], "train: has no class folders"),
        (["train/cat/a.jpg", "train/dog/readme.txt"], "train/dog: class folder without an image"),
        (["train/cat/a.jpg", "train/b.jpg"], r"1 image\(s\) lie directly in it \(such as 'b.jpg'\)"),
    ],
)
def test_a_folder_of_another_shape_is_refused(tmp_path, files, message):
    with pytest.raises(InputError, match=message):
        scan_split(touch(tmp_path, *files), "train")


def test_a_missing_data_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder; --data wants"):
        scan_split(tmp_path / "nowhere", "train")


def test_val_must_have_the_classes_of_train(tmp_path):
    touch(tmp_path, "train/cat/a.jpg", "train/dog/a.jpg", "val/cat/a.jpg", "val/hen/a.jpg")
    train, val = scan_split(tmp_path, "train"), scan_split(tmp_path, "val")
    check_same_classes(train, train)
    with pytest.raises(InputError, match=r"not in val: 'dog'; only in val: 'hen'"):
        check_same_classes(train, val)


def test_the_fingerprint_notices_what_changes(tmp_path):
    touch(tmp_path, "train/cat/a.jpg", "train/dog/b.jpg")

    def fingerprint() -> str:
        return scan_split(tmp_path, "train").fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    (tmp_path / "train/dog/b.jpg").write_bytes(b"longer than before")
    second = fingerprint()
    (tmp_path / "train/dog/b.jpg").rename(tmp_path / "train/dog/c.jpg")
    assert len({first, second, fingerprint()}) == 3
    gone = scan_split(tmp_path, "train")
    (tmp_path / "train/dog/c.jpg").unlink()
    with pytest.raises(InputError, match=r"c\.jpg: cannot be read"):
        gone.fingerprint()


def test_folders_named_like_the_teachers_classes():
    assert class_mapping(["dog", "cat"], ["cat", "cow", "dog"], 3) == {"dog": 2, "cat": 0}


def test_imagenet_folders_mean_their_wordnet_id():
    folders = ["n01440764", "n02102040_springer", "n03888257"]
    expected = {"n01440764": 0, "n02102040_springer": 217, "n03888257": 701}
    assert class_mapping(folders, None, 1000) == expected
    # Torchvision's teachers name their classes in English.
    assert class_mapping(folders, [f"name {i}" for i in range(1000)], 1000) == expected
    few = ["n03888257", "x", "n02102040", "n01440764"]
    assert class_mapping(folders, few, 4) == {"n01440764": 3, "n02102040_springer": 2, "n03888257": 0}


def test_a_wordnet_id_of_nine_digits_is_none():
    with pytest.raises(InputError, match=r"1 of 2\): 'n021020400'"):
        class_mapping(["n01440764", "n021020400"], None, 1000)


def test_imagenet_21k_has_its_own_order():
    from ferkd.classes import wordnet_ids

    ids = wordnet_ids(21841)
    assert len(ids) == 21841
    assert class_mapping([ids[12345]], None, 21841) == {ids[12345]: 12345}


def test_a_nameless_teacher_takes_the_sorted_folders_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert class_mapping(["b", "a"], None, 2) == {"b": 1, "a": 0}
    assert "sorted order ('a', 'b')" in caplog.text


def test_a_named_teacher_never_falls_back_on_the_order():
    with pytest.raises(InputError, match=r"\(2 of 2\): 'b', 'a'.*it knows 'x', 'y'"):
        class_mapping(["b", "a"], ["x", "y"], 2)


def bare(count: int) -> ClassNumbers:
    return ClassNumbers({str(i): i for i in range(count)}, count, bare=True)


def test_numbers_of_as_many_classes_are_the_teacher_s(caplog):
    """Not the sorted order of the numbers as texts, in which 10 comes before 2; and whatever the teacher calls its classes."""
    numbers = bare(12)
    expected = {str(i): i for i in range(12)}
    with caplog.at_level(logging.WARNING):
        assert class_mapping(sorted(numbers.of), None, 12, numbers) == expected
        assert class_mapping(sorted(numbers.of), [f"name {i}" for i in range(12)], 12, numbers) == expected
    assert caplog.text.count("The dataset numbers its 12 classes: taking them to be the teacher's, by number") == 2
    assert class_mapping(["0", "2", "10"], ["10", "2", "0"], 3, ClassNumbers({"0": 0, "2": 2, "10": 10}, 11, bare=True)) == {
        "10": 0, "2": 1, "0": 2,
    }  # fmt: skip


def test_named_and_numbered_classes_go_by_name_first():
    """As a ClassLabel has both. A few of ImageNet's classes, numbered among all 1000; WordNet ids, in an order of their own."""
    english = ClassNumbers({"goldfish": 1, "tench": 0}, 1000, bare=False)
    assert class_mapping(["goldfish", "tench"], None, 1000, english) == {"goldfish": 1, "tench": 0}
    assert class_mapping(["b", "a"], ["a", "b"], 2, ClassNumbers({"b": 0, "a": 1}, 2, bare=False)) == {"b": 1, "a": 0}
    wordnet = ClassNumbers({"n02102040": 0, "n01440764": 1}, 2, bare=False)
    assert class_mapping(["n02102040", "n01440764"], None, 1000, wordnet) == {"n02102040": 217, "n01440764": 0}


@pytest.mark.parametrize(
    ("numbers", "classes", "outputs"),
    [
        (bare(10), None, 1000),  # of what the teacher knows, nobody says which ten
        (ClassNumbers({"0": 0, "7": 7}, 8, bare=True), None, 2),  # two folders, two outputs: but 7 is not the second of two
        (ClassNumbers({"x": 0, "y": 1}, 2, bare=False), ["a", "b"], 2),  # both have names, and they disagree
    ],
)
def test_numbers_of_other_classes_are_refused(numbers, classes, outputs):
    with pytest.raises(InputError, match=rf"without a class of the teacher .* The dataset numbers {numbers.count} classes"):
        class_mapping(sorted(numbers.of), classes, outputs, numbers)


@pytest.mark.parametrize(
    ("folders", "classes", "outputs", "message"),
    [
        (["a", "b"], None, 3, r"without a class of the teacher \(2 of 2\): 'a', 'b'.*does not name"),
        (["a", "b"], ["a", "c"], 2, r"\(1 of 2\): 'b'"),
        (["crane", "b"], ["crane", "crane", "b"], 3, r"\(1 of 3\)|\(1 of 2\): 'crane'"),
        (["n02102040", "n02102040_springer"], None, 1000, "both mean the teacher's class 217; merge them"),
        (["a"], ["a"], 2, "names 1 classes but has 2 outputs"),
    ],
)
def test_folders_without_a_class_are_listed(folders, classes, outputs, message):
    with pytest.raises(InputError, match=message):
        class_mapping(folders, classes, outputs)


def test_without_timm_imagenet_names_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm.data", None)
    with pytest.raises(InputError, match=r"pip install 'ferkd\[timm\]'"):
        class_mapping(["n01440764"], None, 1000)
