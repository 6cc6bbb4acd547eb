"""Reading a store: what was written comes back, from any process, and no damage goes unnoticed."""

import json
import multiprocessing
import os
import pickle
import re
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_stores import HEIGHT, WIDTH, files_of, labelled, make_store, small_plan

import ferkd.store
from ferkd.crops import draw_crops
from ferkd.errors import InputError, StoreError
from ferkd.records import unpack_boxes
from ferkd.regions import RegionPolicy, confidence_of, region_of
from ferkd.store import LabelStore, PathTable

LAYOUTS = pytest.mark.parametrize(("box_codec", "label_codec"), [("stored", "half"), ("replayed", "packed")], ids=["exact", "compact"])


@pytest.fixture(params=["exact", "compact"])
def store(request, tmp_path):
    codecs = {"exact": ("stored", "half"), "compact": ("replayed", "packed")}[request.param]
    return make_store(tmp_path / "store", small_plan(box_codec=codecs[0], label_codec=codecs[1]))


@pytest.fixture
def many_shards(monkeypatch):
    """Shards of one unit, so that a small store has many."""
    monkeypatch.setattr(ferkd.store_writing, "SHARD_BYTES", 1)


# --- What was written comes back


def test_every_image_comes_back_as_it_was_written(store):
    plan = small_plan(box_codec=store.box_codec, label_codec=store.label_codec)
    for i in range(len(store)):
        wanted, found = labelled(plan, i), store.read(i)
        assert (found.path, found.target) == (plan.paths[i], i % 10)
        assert (found.width, found.height, found.photo_crc) == (wanted.width, wanted.height, wanted.photo_crc)
        assert store.entry(i) == (found.path, found.target, found.width, found.height, found.photo_crc)
        if wanted.failure is None:
            assert (found.label_words == wanted.label_words).all()
            boxes, flips = found.boxes(np.array([2, 0]))
            drawn, drawn_flips = draw_crops(plan.crop_settings, i, np.array([2, 0]), WIDTH, HEIGHT)
            assert (boxes == drawn).all()
            assert (flips == drawn_flips).all()


def test_stored_boxes_are_the_boxes_that_would_be_replayed(tmp_path):
    exact = make_store(tmp_path / "exact", small_plan())
    compact = make_store(tmp_path / "compact", small_plan(box_codec="replayed"))
    for i in (0, 1, 149):
        boxes, flips = unpack_boxes(exact.read(i).box_words)
        replayed, replayed_flips = compact.read(i).boxes(np.arange(4))
        assert (boxes == replayed).all()
        assert (flips == replayed_flips).all()


def test_a_store_says_what_it_holds(store):
    assert (len(store), store.crops, store.k, store.classes) == (150, 4, 3, 10)
    assert store.class_names[3] == "class 3"
    assert store.folders == {"c0": 0, "c1": 1, "c2": 2}
    assert store.crop_settings == small_plan().crop_settings
    assert store.exif_applied
    assert store.targets[13] == 3
    assert store.manifest.provenance["device"] == "a cpu"


def test_an_image_that_could_not_be_read_is_marked_and_has_no_crops(store):
    labels = store.read(57)
    assert labels.width == 0
    assert store.manifest.failed[labels.path] == "image 57 cannot be decoded"
    assert len(store.manifest.failed) == 3
    with pytest.raises(StoreError, match="could not be read when the store was made"):
        labels.boxes(np.array([0]))


def test_labels_become_records_for_the_loss(store):
    words = np.stack([store.read(i).label_words[1] for i in (0, 1, 2)])
    records = store.records(words)
    assert records.words.dtype == torch.int32
    assert records.words.is_contiguous()
    assert (records.words.numpy().view(np.uint32) == words).all()
    assert (records.codec, records.k, records.classes) == (store.label_codec, 3, 10)


def test_records_of_read_only_words_are_a_copy(store):
    labels = store.read(0).label_words
    records = store.records(labels)
    records.words.zero_()
    assert (store.read(0).label_words == labels).all()


@pytest.mark.parametrize("image", [-1, 150])
def test_there_is_no_image_beyond_the_last(store, image):
    with pytest.raises(IndexError):
        store.read(image)
    with pytest.raises(IndexError):
        store.entry(image)


def test_crops_beyond_the_last_are_refused(store):
    for crops in ([4], [0, 7]):
        with pytest.raises(IndexError):
            store.read(0).boxes(np.array(crops))


# --- Paths


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=5), unique=True, min_size=1, max_size=20)
)
def test_paths_are_sorted_by_their_bytes_and_found_again(names):
    paths = [f"folder/{name}x" for name in names]
    table = PathTable.from_paths(paths)
    assert list(table) == sorted(paths, key=str.encode)
    assert [table.index_of(path) for path in table] == list(range(len(paths)))
    with pytest.raises(InputError, match="is not among the"):
        table.index_of("folder/")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a//b", "./a", "", "a/", "a\0b"])
def test_paths_that_leave_the_folder_are_refused(path):
    with pytest.raises(InputError, match="is not a path below"):
        PathTable.from_paths(["good", path])


def test_a_path_named_twice_and_no_path_are_refused():
    with pytest.raises(InputError, match="named twice"):
        PathTable.from_paths(["a", "b", "a"])
    with pytest.raises(InputError, match="no image"):
        PathTable.from_paths([])


def test_a_hostile_path_in_an_index_is_refused(tmp_path):
    store = make_store(tmp_path, small_plan(images=3))
    index = tmp_path / "index.bin"
    index.write_bytes(index.read_bytes().replace(b"c0/image", b"../image"))
    with pytest.raises(StoreError, match="is no path below the dataset's folder"):
        LabelStore(store.path).entry(0)


# --- Processes and threads


def _sum_of(store, images):
    return [int(store.read(i).label_words.astype(np.int64).sum()) for i in images]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_forked_and_spawned_workers_read_the_same(tmp_path, start):
    store = make_store(tmp_path, small_plan())
    images = list(range(0, 150, 3))
    wanted = _sum_of(store, images)  # the parent has its shards open when it forks
    context = multiprocessing.get_context(start)
    with context.Pool(2) as pool:
        found = pool.starmap(_sum_of, [(store, images[:25]), (store, images[25:])])
    assert found[0] + found[1] == wanted


def test_a_store_pickles_as_its_path(store):
    assert len(pickle.dumps(store)) < 300
    again = pickle.loads(pickle.dumps(store))
    assert (again.read(3).label_words == store.read(3).label_words).all()


def test_no_more_shards_are_open_than_allowed_and_threads_do_not_mind(tmp_path, many_shards, monkeypatch):
    monkeypatch.setattr(ferkd.store, "_OPEN_SHARDS", 2)
    store = make_store(tmp_path, small_plan(images=640, crops=1))
    assert len(store.manifest.shards) == 10
    wanted = _sum_of(store, range(640))
    wrong = []

    def reader(seed):
        for i in np.random.default_rng(seed).permutation(640).tolist():
            try:
                if _sum_of(store, [i]) != wanted[i : i + 1]:
                    wrong.append(i)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    open_files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
    assert sum(str(tmp_path) in name for name in open_files) <= 3 + 4


# --- Policies


@pytest.mark.parametrize("confidence", ["max", "target"])
def test_a_scan_counts_what_the_region_rule_says(store, confidence):
    policy = RegionPolicy(discard_below=0.4, calibrate_below=0.6, discard_above=0.9, confidence=confidence)
    usable, counts = [], np.zeros(3, np.int64)
    for i in range(150):
        labels = store.read(i)
        if labels.width == 0:
            usable.append(False)
            continue
        ids, probs = (torch.from_numpy(x) for x in store.unpack(labels.label_words))
        region = region_of(confidence_of(ids, probs, torch.full((4,), labels.target), 10, confidence), policy)
        usable.append(bool((region > 0).any()))
        counts += np.bincount(region.numpy(), minlength=3)
    scan = store.scan(policy)
    assert scan.usable.tolist() == usable
    assert scan.counts.tolist() == counts.tolist()
    assert scan.counts.sum() == 147 * 4


def test_a_scan_is_made_once_and_again_when_the_store_is_another(tmp_path, monkeypatch):
    policy = RegionPolicy(discard_below=0.5)
    store = make_store(tmp_path / "a", small_plan())
    calls = []
    wanted = store.scan(policy, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (150, 150)
    again = store.scan(policy, lambda done, total: pytest.fail("scanned twice"))
    assert (again.usable == wanted.usable).all()
    assert (again.counts == wanted.counts).all()
    other = make_store(tmp_path / "b", small_plan(batch_size=33))
    (tmp_path / "b/policies").mkdir()
    [kept] = (tmp_path / "a/policies").iterdir()
    (tmp_path / "b/policies" / kept.name).write_bytes(kept.read_bytes())
    calls.clear()
    other.scan(policy, lambda done, total: calls.append(done))
    assert calls


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b"no array", lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]])
def test_a_damaged_scan_is_made_anew(tmp_path, damage):
    policy = RegionPolicy(discard_below=0.5)
    store = make_store(tmp_path, small_plan())
    wanted = store.scan(policy)
    [kept] = (tmp_path / "policies").iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert (store.scan(policy).usable == wanted.usable).all()


def test_a_store_that_cannot_be_written_is_scanned_all_the_same(tmp_path):
    store = make_store(tmp_path, small_plan(images=64))
    (tmp_path / "policies").write_text("a file where the folder would be")
    assert store.scan(RegionPolicy()).counts.sum() == 62 * 4


# --- Damage


def test_a_flipped_bit_anywhere_in_a_shard_or_the_index_is_found(tmp_path):
    store = make_store(tmp_path, small_plan(images=5, crops=2, k=2))
    wanted = [_sum_of(store, [i]) for i in range(5)]
    for name in ("shards/shard-00000.bin", "index.bin"):
        file = tmp_path / name
        whole = file.read_bytes()
        for at in range(len(whole)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            found = 0
            try:
                damaged = LabelStore(tmp_path)
                for i in range(5):
                    try:
                        assert _sum_of(damaged, [i]) == wanted[i]
                    except StoreError:
                        found += 1
            except StoreError:
                found += 1
            assert found, f"byte {at} of {name}"
            with pytest.raises(StoreError):
                LabelStore(tmp_path).check_integrity()
        file.write_bytes(whole)
    LabelStore(tmp_path).check_integrity()


def test_a_damaged_label_names_file_image_and_remedy(store):
    file = store.path / "shards/shard-00000.bin"
    whole = bytearray(file.read_bytes())
    whole[0] ^= 1
    file.write_bytes(whole)
    with pytest.raises(StoreError, match=r"shard-00000\.bin: the labels of image 0 \(c0/image00000\.jpg\) .* fetch it again"):
        LabelStore(store.path).read(0)
    with pytest.raises(StoreError, match=r"shard-00000\.bin: its SHA-256 is not .* \(1 images: c0/image00000\.jpg\)"):
        LabelStore(store.path).check_integrity()


def test_swapped_shards_are_found(tmp_path, many_shards):
    make_store(tmp_path, small_plan(images=128))
    a, b = tmp_path / "shards/shard-00000.bin", tmp_path / "shards/shard-00001.bin"
    a.rename(tmp_path / "x")
    b.rename(a)
    (tmp_path / "x").rename(b)
    store = LabelStore(tmp_path)
    for i in (0, 64):
        with pytest.raises(StoreError, match="CRC32"):
            store.read(i)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b"", lambda b: b + b"\0"])
def test_a_shard_of_another_length_is_refused_at_opening(store, change):
    file = store.path / "shards/shard-00000.bin"
    whole = file.read_bytes()
    file.write_bytes(change(whole))
    with pytest.raises(StoreError, match=rf"shard-00000\.bin: [\d,]+ bytes, the manifest says {len(whole):,}:"):
        LabelStore(store.path)


def test_a_shard_cut_short_while_it_is_used_is_an_error(store):
    store.read(0)
    os.truncate(store.path / "shards/shard-00000.bin", 100)
    with pytest.raises(StoreError, match=r"shard-00000\.bin"):
        store.read(63)


@pytest.mark.parametrize("name", ["shards/shard-00000.bin", "index.bin"])
def test_a_missing_file_is_named(store, name):
    (store.path / name).unlink()
    with pytest.raises(StoreError, match=re.escape(f"{store.path / name}: is missing")):
        LabelStore(store.path)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b"", lambda b: b + b"x"])
def test_an_index_of_another_length_is_refused(store, change):
    file = store.path / "index.bin"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(StoreError, match=r"index\.bin: [\d,]+ bytes, the manifest says"):
        LabelStore(store.path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t[: len(t) // 2], "is no JSON"),
        (lambda t: "", "is no JSON"),
        (lambda t: "\xff\xfe not text", "is no JSON"),
        (lambda t: "[1, 2]", "this is not a store of labels"),
        (lambda t: t.replace("ferkd-store", "other"), "this is not a store of labels"),
        (lambda t: t.replace('"version": 1', '"version": 2'), "format version 2, this ferkd reads version 1"),
        (lambda t: t.replace('"temperature": 1.0', '"temperature": 2.0'), "was edited or damaged"),
        (lambda t: t.replace('"class 3"', '"klass 3"'), "was edited or damaged"),
        (lambda t: t + " ", "was edited or damaged"),
        (lambda t: json.dumps(json.loads(t)), "was edited or damaged"),
    ],
)
def test_a_manifest_that_is_not_as_it_was_written_is_refused(tmp_path, change, says):
    make_store(tmp_path, small_plan(images=3))
    file = tmp_path / "manifest.json"
    file.write_text(change(file.read_text()), encoding="latin-1")
    with pytest.raises(StoreError, match=says) as raised:
        LabelStore(tmp_path)
    assert str(file) in str(raised.value)


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no such folder"):
        LabelStore(tmp_path / "none")
    with pytest.raises(StoreError, match=r"has no manifest\.json"):
        LabelStore(tmp_path)


def test_checking_and_reading_leave_a_store_as_it_is(store):
    before = files_of(store.path)
    store.check_integrity()
    store.read(0)
    LabelStore(store.path)
    assert files_of(store.path) == before
