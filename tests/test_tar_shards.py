"""Tar shards: what is a sample, how shards are found, and what damaged, ambiguous or hostile tars get."""

from __future__ import annotations

import gzip
import io
import logging
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from sources import write_tar

from ferkd.errors import InputError, SourceLost
from ferkd.sources import Split, scan_split, tar_index
from ferkd.sources import tars as module

IMAGE = b"x" * 700


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FERKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def shard(root: Path, files: Sequence[tuple[str, bytes]], name: str = "train/0.tar") -> Path:
    return write_tar(root / name, files)


def train(root: Path) -> Split:
    return scan_split(f"wds:{root}", "train")


def contents(split: Split) -> list[tuple[str, str, bytes]]:
    return [(path, split.folders[folder], split.photos.read(path)) for path, folder in zip(split.paths, split.folder_of, strict=True)]


TWO = [("a.jpg", b"one"), ("a.cls", b"cat"), ("b.png", b"two"), ("b.cls", b"dog")]


def test_what_webdataset_writes_is_read(tmp_path: Path) -> None:
    """Over several shards, keys with folders and with letters beyond ASCII, numbers and texts as classes."""
    webdataset = pytest.importorskip("webdataset")
    long = "deep/" * 30 + "n01440764_ä"
    for number, keys in enumerate((["x/a", long], ["x/a", "犬"])):
        with webdataset.TarWriter(str(tmp_path / f"imagenet1k-train-{number:04d}.tar")) as writer:
            for key in keys:
                writer.write({"__key__": key, "jpg": f"{number} {key}".encode(), "cls": number * 5 + 2, "json": {"width": 4}})
    split = train(tmp_path)
    wanted = [(n, key) for n, key in ((0, "x/a"), (0, long), (1, "x/a"), (1, "犬"))]
    assert sorted(contents(split)) == sorted(
        (f"imagenet1k-train-{n:04d}.tar/{key}.jpg", str(5 * n + 2), f"{n} {key}".encode()) for n, key in wanted
    )
    assert list(split.paths) == sorted(split.paths)
    assert split.numbers is not None
    assert (dict(split.numbers.of), split.numbers.count, split.numbers.bare) == ({"2": 2, "7": 7}, 8, True)
    theirs = webdataset.WebDataset(str(tmp_path / "imagenet1k-train-0001.tar"), shardshuffle=False)
    assert [sample["jpg"] for sample in theirs] == [data for path, _, data in contents(split) if "0001" in path]


def test_a_sample_is_what_shares_a_key(tmp_path: Path) -> None:
    files = [("./n1/a.v2.JPG", b"no image: its extension is v2.jpg"), ("./n1/a.cls", b"cat")]
    files += [("n1/b.JPG", b"b"), ("n1/b.seg.png", b"no photograph"), ("n1/b.json", b'{"class": "dog", "width": 3}')]
    files += [("n1/._b.jpg", b"hidden"), ("n1/readme", b"no extension"), ("n2/b.jpeg", b"c"), ("n2/b.cls", b" cat\n"), ("n2/b.json", b"{")]
    assert contents(train(shard(tmp_path, files).parents[1])) == [("0.tar/n1/b.JPG", "dog", b"b"), ("0.tar/n2/b.jpeg", "cat", b"c")]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_is_read(tmp_path: Path, form: int) -> None:
    (tmp_path / "train").mkdir()
    names = ["a", "b/" * 40 + "b" * 60, "c/" * 45 + "c" * 90] if form != tarfile.USTAR_FORMAT else ["a", "b/" * 40 + "b" * 60]
    with tarfile.open(tmp_path / "train/0.tar", "w", format=form) as tar:
        tar.addfile(_folder("b"))
        for name in names:
            for extension, data in ((".jpg", name.encode()), (".cls", b"7")):
                tar.addfile(_file(name + extension, data), io.BytesIO(data))
    assert [data.decode() for _, _, data in contents(train(tmp_path))] == names


def _file(name: str, data: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info


def _folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def _link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def test_numbers_are_class_indices_however_they_are_written(tmp_path: Path) -> None:
    files = [("a.jpg", b""), ("a.cls", b"007"), ("b.jpg", b""), ("b.json", b'{"label": 7}'), ("c.jpg", b""), ("c.cls", b"10\n")]
    split = train(shard(tmp_path, files).parents[1])
    assert split.folders == ("10", "7")
    assert split.folder_of.tolist() == [1, 1, 0]
    mixed = train(shard(tmp_path / "mixed", [*files, ("d.jpg", b""), ("d.cls", b"cat")]).parents[1])
    assert (mixed.folders, mixed.numbers) == (("007", "10", "7", "cat"), None)


def test_odd_samples_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = [("c.jpg", b""), ("d.cls", b"cat"), ("e.jpg", b""), ("e.png", b""), ("e.cls", b"cat"), ("f.jpg", b""), ("f.cls", b"\xff\0")]
    odd += [("g.jpg", b""), ("g.json", b'{"label": "\\ud800"}'), ("h.jpg", b""), ("h.cls", b"x" * 5000)]
    root = shard(tmp_path, TWO + odd).parents[1]
    for _ in range(2):  # read from the tar, and from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(train(root)) == 2
        assert "4 sample(s) with no class are left out: '0.tar/c', '0.tar/f', '0.tar/g', '0.tar/h'" in caplog.text
        assert "1 sample(s) with no image are left out: '0.tar/d'" in caplog.text
        assert "1 sample(s) with 2 images (jpg, png) are left out: '0.tar/e'" in caplog.text


def test_the_index_is_kept_and_made_anew_when_a_shard_changes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path, TWO)
    first = contents(train(tmp_path))
    walks = []
    walk = tar_index._walk
    monkeypatch.setattr(tar_index, "_walk", lambda *arguments: walks.append(1) or walk(*arguments))
    assert contents(train(tmp_path)) == first
    assert not walks
    (kept,) = cache.iterdir()
    data = bytearray(kept.read_bytes())
    data[data.index(b"0.tar/a.jpg")] ^= 1
    kept.write_bytes(data)
    assert contents(train(tmp_path)) == first  # a damaged cache is no index
    assert len(walks) == 1
    shard(tmp_path, [*TWO, ("c.jpg", b"three"), ("c.cls", b"cat")])
    os.utime(path, (1, 1))
    assert len(train(tmp_path)) == 3
    assert len(walks) == 2
    assert len(list(cache.iterdir())) == 1
    cache.chmod(0o500)
    os.utime(path, (2, 2))
    assert len(train(tmp_path)) == 3


def test_a_shard_that_changed_meanwhile_is_lost_and_no_unreadable_photograph(tmp_path: Path) -> None:
    path = shard(tmp_path, TWO)
    split = train(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SourceLost, match=r"0\.tar: was changed since its headers were read \(10,240 bytes then, 1,000 now\)"):
        split.photos.read("0.tar/a.jpg")
    path.unlink()
    with pytest.raises(SourceLost, match=r"0\.tar: cannot be opened: No such file"):
        split.photos.read("0.tar/a.jpg")
    with pytest.raises(InputError, match=r"no\.jpg: cannot be read: there is no such file in the shard"):
        split.photos.read("0.tar/no.jpg")


def test_more_shards_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPEN_SHARDS", 2)
    for number in range(5):
        shard(tmp_path, [(f"{number}.jpg", str(number).encode()), (f"{number}.cls", b"1")], f"train/{number}.tar")
    split = train(tmp_path)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 4))
    assert [split.photos.read(split.paths[i]) for i in order.tolist()] == [str(i).encode() for i in order]
    assert len(split.photos._open) == 2


def _twice(root: Path) -> None:
    shard(root, TWO)
    shard(root, TWO, "x-train-0.tar")


def _both(root: Path) -> None:
    shard(root, TWO, "train-val-0.tar")


def _compressed(root: Path) -> None:
    data = shard(root, TWO).read_bytes()
    (root / "train/0.tar").write_bytes(gzip.compress(data))


def _cut(at: int) -> Callable[[Path], None]:
    def cut(root: Path) -> None:
        path = shard(root, [("a.jpg", IMAGE), ("a.cls", b"cat"), ("b.jpg", IMAGE), ("b.cls", b"cat")])
        path.write_bytes(path.read_bytes()[:at])

    return cut


def _flip(root: Path) -> None:
    path = shard(root, TWO)
    data = bytearray(path.read_bytes())
    data[2 * 512 + 3] ^= 1
    path.write_bytes(data)


def _strung(root: Path) -> None:
    path = shard(root, TWO)
    path.write_bytes(path.read_bytes() + shard(root, [("c.jpg", b""), ("c.cls", b"cat")], "other/1.tar").read_bytes())


def _raw(*members: tarfile.TarInfo) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        (root / "train").mkdir(parents=True)
        with tarfile.open(root / "train/0.tar", "w", errors="surrogateescape") as tar:
            for member in members:
                tar.addfile(member, io.BytesIO(b"x" * member.size))

    return write


def _negative(root: Path) -> None:
    info = _file("a.jpg", b"")
    info.pax_headers = {"size": "-1024"}
    _raw(_file("z.jpg", b"x" * 3000), info)(root)


def _endless(root: Path) -> None:
    info = _file("a.jpg", b"")
    info.pax_headers = {"size": str(2**62)}
    _raw(info)(root)


def _pipe(root: Path) -> None:
    (root / "train").mkdir(parents=True)
    os.mkfifo(root / "train/0.tar")


BAD: list[tuple[str, Callable[[Path], object], str]] = [
    ("no such folder", lambda root: None, r"no such folder; give the folder that holds the tar shards"),
    ("no shards", lambda root: (root / "train").mkdir(parents=True), r"has no tar shards of train; put them in .*/train/\*\.tar"),
    ("two sets of shards", _twice, r"has shards of train in .*/train and beside it \(x-train-0\.tar\); which\?"),
    ("train and val in one name", _both, r"train-val-0\.tar: is it of train or of val\?"),
    ("a .tar.gz", lambda root: shard(root, TWO, "train/0.tar.gz"), r"0\.tar\.gz: is compressed.*unpack it to a plain \.tar"),
    ("compressed, and named .tar", _compressed, r"0\.tar: is compressed; unpack it \(gzip -d\)"),
    ("a file of 0 bytes", _cut(0), r"0\.tar: is no tar, or a damaged one"),
    ("no tar", lambda root: shard(root, []).write_bytes(b"<html>" * 200), r"0\.tar: is no tar, or a damaged one"),
    ("an empty tar", lambda root: shard(root, []), r"no sample with an image and a class: the shards are empty"),
    ("cut in a photograph", _cut(800), r"0\.tar: is cut short: it ends at byte 800"),
    ("cut in the last file", _cut(4609), r"0\.tar: is cut short: it ends at byte 4,609, in the midst of a file"),
    ("cut in a header", _cut(2700), r"0\.tar: is cut short: it ends at byte 2,700, without an end mark"),
    ("cut between two files", _cut(1536), r"0\.tar: is cut short: it ends at byte 1,536, without an end mark"),
    ("a flipped bit in a header", _flip, r"0\.tar: its header at byte 1,024 is damaged"),
    ("tars strung together", _strung, r"0\.tar: goes on after its end mark at byte 4,096"),
    ("a key that comes again", lambda root: shard(root, [*TWO, ("a.json", b"{}")]), r"0\.tar: the key 'a' comes twice"),
    ("two files of one name", lambda root: shard(root, [*TWO[:2], ("a.jpg", b"")]), r"0\.tar: has two files 'a\.jpg'"),
    ("no class at all", lambda root: shard(root, [("a.jpg", b"")]), r"no sample with an image and a class: 1 sample\(s\) with no class"),
    ("a path out of the folder", lambda root: shard(root, [("../../a.jpg", b"")]), r"holds '\.\./\.\./a\.jpg', a path that leads out"),
    ("an absolute path", lambda root: shard(root, [("/etc/a.jpg", b"")]), r"holds '/etc/a\.jpg', a path that leads out"),
    ("a symbolic link", _raw(_link("a.jpg", tarfile.SYMTYPE)), r"'a\.jpg' is no plain file in it but a link"),
    ("a hard link", _raw(_link("a.jpg", tarfile.LNKTYPE)), r"'a\.jpg' is no plain file in it but a link"),
    ("a size beyond everything", _endless, r"0\.tar: cannot be read \(Invalid argument\), or is a damaged tar"),
    ("a pipe", _pipe, r"0\.tar: is no file; remove it"),
    ("a size below nothing", _negative, r"0\.tar: (its header at byte|is no tar, or a damaged one)"),
    ("a name that is not UTF-8", _raw(_file("\udcff.jpg", b"x")), r"holds a file whose name is not UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_shards_get_one_line(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    root = tmp_path / "shards"
    spoil(root)
    with pytest.raises(InputError) as caught:
        train(root)
    assert "\n" not in str(caught.value)
    assert re.search(message, str(caught.value)), str(caught.value)
