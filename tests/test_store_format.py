"""The store's files have the bytes that docs/formats.md says, so that a change of format fails here first."""

import hashlib
import json
import zlib

import numpy as np
import pytest
from small_stores import files_of

from ferkd.crops import CropSettings
from ferkd.records import pack_boxes, pack_labels
from ferkd.store import LabelledImage, LabelStore, PathTable, StorePlan, StoreWriter, images_a_shard

SHARD = {
    "half": "0100 01c0 0080 0000  0500 03c0 0100 0110  0000 0038  0100 003a"
    "0000 0000 0000 0000  0000 0000 0000 0000  0000 0000  0000 0000"
    "0100 01c0 0080 0000  0500 03c0 0100 0110  0000 003c  0100 0034",
    "packed": "7c150000 f52a0000  00000000 00000000  fcff0000 05000000",
}
INDEX = {
    "half": """
      6665726b64696478 01000000 10000000 0300000000000000 1c00000000000000
      0000000000000000 0900000000000000 1200000000000000 1c00000000000000
      00000000 1e00 1400 44332211 40154d49
      00000000 0000 0000 00000000 99efb48e
      02000000 1f00 1500 88776655 02677aa6
      6361742f612e6a7067 6361742f622e706e67 64c3b6672f632e6a7067""",
    "packed": """
      6665726b64696478 01000000 10000000 0300000000000000 1c00000000000000
      0000000000000000 0900000000000000 1200000000000000 1c00000000000000
      00000000 1e00 1400 44332211 e941bac7
      00000000 0000 0000 00000000 1bbd6043
      02000000 1f00 1500 88776655 92aa742e
      6361742f612e6a7067 6361742f622e706e67 64c3b6672f632e6a7067""",
}
ROWS = (
    "6665726b64726f77 0000000000000000 0300000000000000 1900000000000000"
    "9eb602100ab60b2cbffde76a1f2e89ccdd83ee4d7da7dc5ecee7da34092bdfb3"
    "000000001e0014004433221140154d49 000000000000000000000000 99efb48e 020000001f0015008877665502677aa6"
    "7b2231223a2263616e6e6f74206265206465636f646564227d 2a701f11"
)
UNIT = "6665726b64756e74 908a0d87c46e61c8 0000000000000000 9100000000000000 03000000 786ddcd7 a4b723ce"


def page_plan(label_codec):
    return StorePlan(
        paths=PathTable.from_paths(["cat/b.png", "cat/a.jpg", "dög/c.jpg"]),
        targets=np.array([0, 0, 2]),
        crops=2,
        k=1,
        class_names=["cat", "cow", "dog"],
        folders={"cat": 0, "dög": 2},
        box_codec="stored" if label_codec == "half" else "replayed",
        label_codec=label_codec,
        crop_settings=CropSettings(seed=7),
        batch_size=16,
        temperature=1.0,
        provenance={"teacher": "none"},
    )


def page_images(plan):
    def labels(*probs):
        return pack_labels(np.array([[0], [1]]), np.array(probs, np.float32)[:, None], plan.label_codec, 3)

    boxes = pack_boxes(np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), np.array([False, True])) if plan.box_codec == "stored" else None
    return [
        LabelledImage(30, 20, 0x11223344, boxes, labels(0.5, 0.75)),
        LabelledImage(0, 0, 0, None, None, "cannot be decoded"),
        LabelledImage(31, 21, 0x55667788, boxes, labels(1.0, 0.25)),
    ]


@pytest.mark.parametrize("label_codec", ["half", "packed"])
def test_shard_and_index_are_the_pages(tmp_path, label_codec):
    plan = page_plan(label_codec)
    with StoreWriter(tmp_path, plan) as writer:
        writer.write_unit(0, page_images(plan))
        writer.finish_shard(0)
        writer.finish()
    assert sorted(files_of(tmp_path)) == ["index.bin", "manifest.json", "shards/shard-00000.bin"]
    assert (tmp_path / "shards/shard-00000.bin").read_bytes() == bytes.fromhex(SHARD[label_codec])
    assert (tmp_path / "index.bin").read_bytes() == bytes.fromhex(INDEX[label_codec])


def test_the_manifest_is_the_pages(tmp_path):
    plan = page_plan("half")
    with StoreWriter(tmp_path, plan) as writer:
        writer.write_unit(0, page_images(plan))
        writer.finish_shard(0)
        writer.finish()
    text = (tmp_path / "manifest.json").read_bytes()
    assert json.loads(text) == {
        "format": "ferkd-store",
        "version": 1,
        "images": 3,
        "crops": 2,
        "k": 1,
        "classes": 3,
        "box_codec": "stored",
        "label_codec": "half",
        "crop_settings": {"seed": 7, "scale": [0.08, 1.0], "ratio": [0.75, 1.3333333333333333], "flip": True},
        "temperature": 1.0,
        "batch_size": 16,
        "shard_images": 64,
        "dataset": {
            "paths_sha256": "e8d3532ef1335717470941d38c6ef8999f2d53952b9e33900298426acf931915",
            "targets_sha256": "4a703711c368bb9ea248151bb9be049ade4b87d4aad250ec2e87ec51904e3804",
        },
        "provenance": {"teacher": "none"},
        "class_names": ["cat", "cow", "dog"],
        "folders": {"cat": 0, "dög": 2},
        "resumed_with": [],
        "shards": [
            {
                "file": "shards/shard-00000.bin",
                "images": 3,
                "bytes": 72,
                "sha256": "9eb602100ab60b2cbffde76a1f2e89ccdd83ee4d7da7dc5ecee7da34092bdfb3",
            }
        ],
        "index": {
            "file": "index.bin",
            "images": 3,
            "bytes": 140,
            "sha256": "07e1b1c0c25ff9a9447c2cc19487781630255b3cefe47904626bbd1534b4df8a",
        },
        "failed": {"cat/b.png": "cannot be decoded"},
        "sha256": "5f66b8bbc44cd12dd071d7c9f404290983ae1aaf8dd242dc9fcd852a001963c0",
    }
    digest = json.loads(text)["sha256"].encode()
    assert text.endswith(b'"sha256": "' + digest + b'"\n}\n')
    assert hashlib.sha256(text.replace(digest, b"0" * 64)).hexdigest().encode() == digest


def test_the_working_files_are_the_pages(tmp_path):
    plan = page_plan("half")
    with StoreWriter(tmp_path, plan) as writer:
        writer.write_unit(0, page_images(plan))
        part = (tmp_path / "shards/shard-00000.part").read_bytes()
        assert part[:44] == bytes.fromhex(UNIT)
        index = bytes.fromhex(INDEX["half"])
        reasons = b'{"1":"cannot be decoded"}'
        assert part[44:] == index[64:112] + bytes.fromhex(SHARD["half"]) + reasons
        writer.finish_shard(0)
        rows = (tmp_path / "shards/shard-00000.rows").read_bytes()
        assert rows[:64] == bytes.fromhex(ROWS.replace(" ", "")[:128])
        assert rows[64:-4] == index[64:112] + reasons
        assert rows[-4:] == bytes.fromhex("2a701f11") == zlib.crc32(rows[:-4]).to_bytes(4, "little")
        assert set(json.loads((tmp_path / "lock").read_bytes())) == {"host", "pid", "job"}


def test_a_reader_written_from_the_page_alone_finds_the_same(tmp_path):
    plan = page_plan("half")
    with StoreWriter(tmp_path, plan) as writer:
        writer.write_unit(0, page_images(plan))
        writer.finish_shard(0)
        store = writer.finish()
    index = (tmp_path / "index.bin").read_bytes()
    shard = (tmp_path / "shards/shard-00000.bin").read_bytes()
    n = int.from_bytes(index[16:24], "little")
    for i in range(n):
        start, end = (int.from_bytes(index[32 + 8 * j : 40 + 8 * j], "little") for j in (i, i + 1))
        row = index[32 + 8 * (n + 1) + 16 * i :][:16]
        path = index[32 + 8 * (n + 1) + 16 * n :][start:end]
        block = shard[24 * i : 24 * (i + 1)]
        assert zlib.crc32(block + row[:12] + path) == int.from_bytes(row[12:], "little")
        assert store.entry(i).path == path.decode()
    third = store.read(2)
    assert (third.path, third.target, third.width, third.height, third.photo_crc) == ("dög/c.jpg", 2, 31, 21, 0x55667788)
    boxes, flips = third.boxes(np.array([1]))
    assert (boxes.tolist(), flips.tolist()) == ([[5, 6, 7, 8]], [True])
    ids, probs = store.unpack(third.label_words)
    assert (ids.tolist(), probs.tolist()) == ([[0], [1]], [[1.0], [0.25]])


@pytest.mark.parametrize(
    ("crops", "crop_bytes", "images", "a_shard"),
    [
        (200, 28, 1_281_167, 5056),
        (200, 28, 14_000_000, 11968),
        (500, 28, 14_000_000, 4736),
        (200, 12, 1 << 40, 27904),
        (500, 40000, 14_000_000, 64),
        (200, 28, 1, 64),
        (200, 28, 16384, 64),
        (200, 28, 16385, 128),
    ],
)
def test_shards_hold_about_64_megabytes_or_are_some_256(crops, crop_bytes, images, a_shard):
    assert images_a_shard(crops * crop_bytes, images) == a_shard
    assert a_shard == max(64, min(67108864 // (crops * crop_bytes), (images + 16383) // 16384 * 64) // 64 * 64)  # the page's formula


def test_paths_that_are_not_utf8_survive_to_the_byte(tmp_path):
    odd = b"c/caf\xe9.jpg".decode("utf-8", "surrogateescape")
    plan = StorePlan(
        PathTable.from_paths([odd]), np.array([0]), 1, 1, ["c", odd], {"c": 0}, "replayed", "half", CropSettings(), 1, 1.0, {"seen": odd}
    )
    with StoreWriter(tmp_path, plan) as writer:
        writer.write_unit(0, [LabelledImage(0, 0, 0, None, None, "unreadable")])
        writer.finish_shard(0)
        writer.finish()
    store = LabelStore(tmp_path)
    assert store.read(0).path == odd
    assert store.class_names == ("c", odd)
    assert store.manifest.failed == {odd: "unreadable"}
