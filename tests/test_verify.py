"""Verification: a store that is right passes, and each thing that can be wrong with it fails by its own check."""

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_stores import make_store, small_plan
from tiny_teachers import GREYS

import ferkd.crops
import ferkd.devices
import ferkd.verify
from ferkd import label_batches, label_plan
from ferkd.cli import main
from ferkd.crops import Photo, take_crop
from ferkd.errors import InputError, StoreError
from ferkd.label_crew import Task
from ferkd.labeling import LabelSettings, label
from ferkd.store import StoreWriter
from ferkd.verify import VerifySettings, verify

PHOTOS = 9  # of each of eight grey levels: 72, so that a sample of 288 crops sees every one


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i, level in enumerate(GREYS):
        folder = root / f"train/g{i}"
        folder.mkdir(parents=True)
        for number in range(PHOTOS):
            height, width = random.integers(30, 60, 2)
            pixels = np.clip(level + random.normal(0, 40, (height, width, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02d}.jpg", quality=95)
    (root / "train/g3/05.jpg").write_bytes(b"")
    return root


def label_settings(data, out, **changes) -> LabelSettings:
    settings = LabelSettings(data, "python:tiny_teachers:grey", out, crops=8, topk=3, batch_size=20, skip_preflight=True)
    return dataclasses.replace(settings, **changes)


@pytest.fixture(scope="module")
def made(photos, tmp_path_factory):
    """A store of the photos."""
    out = tmp_path_factory.mktemp("made") / "store"
    label(label_settings(photos, out), lambda _: None)
    return out


@pytest.fixture
def copy(photos, tmp_path):
    """The photos, to be changed."""
    shutil.copytree(photos, tmp_path / "data")
    return tmp_path / "data"


def failed(verdict) -> set[str]:
    return {check.name for check in verdict.checks if check.passed is False}


def check(verdict, name):
    return next(check for check in verdict.checks if check.name == name)


def verified(store, data, teacher="grey", **changes):
    return verify(VerifySettings(store, data, f"python:tiny_teachers:{teacher}", samples=288, **changes))


@pytest.mark.parametrize("changes", [{}, {"layout": "compact"}, {"classes": "folder", "topk": 8}, {"input_size": 24}, {"autocast": "bf16"}])
def test_a_store_that_is_right_passes_to_the_bit(photos, tmp_path, changes):
    label(label_settings(photos, tmp_path / "store", **changes), lambda _: None)
    verdict = verified(tmp_path / "store", photos)
    assert verdict.passed, verdict.reasons()
    assert verdict.measures["same_records"] == 1.0
    assert verdict.measures["kl_largest"] == 0.0
    assert verdict.measures["photos"] == 71  # one has no labels
    assert verdict.measures["crops"] == 71 * 4
    assert verdict.measures["pixels_largest"] <= 2


def test_a_passing_and_a_failing_store_on_the_command_line(made, photos, capsys):
    command = ["verify", str(made), "--data", str(photos), "--samples", "40", "--teacher"]
    main([*command, "python:tiny_teachers:grey"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["check", "found", "wanted"]
    assert lines[-1] == f"{made}: PASS"
    with pytest.raises(SystemExit) as stopped:
        main([*command, "python:tiny_teachers:vague"])
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"{made}: FAIL"
    assert f"ferkd verify: {made}: FAIL: records: 0.0% of 40 the same to the bit" in err
    with pytest.raises(SystemExit) as stopped:
        main([*command, "python:tiny_teachers:vague", "--json"])
    assert stopped.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "fail"
    assert found["measures"]["kl_mean"] > 0.1
    assert {"name": "photos' CRC32", "found": "0 of 10 changed", "wanted": "none changed", "passed": True} in found["checks"]


# ---- The teacher


def test_another_teacher_is_caught(made, photos):
    assert {"teacher's weights", "records", "KL, stored from new"} <= failed(verified(made, photos, "overconfident"))
    assert {"records", "KL, stored from new"} <= failed(verified(made, photos, "vague"))  # the same weights, other arithmetic


def test_wrong_normalisation_is_caught_and_named(photos, made, tmp_path):
    """Once where the store is right and the teacher's settings are wrong, once the other way round."""
    here = verified(made, photos, "wrong_normalisation")
    assert {"preprocessing", "records", "KL, stored from new", "first answer agrees"} <= failed(here)
    assert check(here, "preprocessing").found == "mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)"
    assert "mean 0.5 and std 0.5" in here.cause
    label(label_settings(photos, tmp_path / "store", teacher="python:tiny_teachers:wrong_normalisation"), lambda _: None)
    there = verified(tmp_path / "store", photos)
    assert {"preprocessing", "records", "KL, stored from new"} <= failed(there)
    assert "ImageNet's mean and std" in there.cause


def test_another_order_of_classes_is_caught(made, photos):
    assert failed(verified(made, photos, "permuted")) == {"classes"}


def test_a_teacher_of_other_classes_is_not_asked(made, photos):
    verdict = verified(made, photos, "nine")
    assert {"classes", "teacher's weights"} <= failed(verdict)
    assert not verdict.measures


# ---- The photos


def test_a_photo_changed_without_changing_its_size_is_caught(made, copy):
    photo = copy / "train/g2/07.jpg"
    data = bytearray(photo.read_bytes())
    data[-30] ^= 1
    photo.write_bytes(data)
    verdict = verified(made, copy)
    assert failed(verdict) == {"photos' CRC32"}
    assert check(verdict, "photos' CRC32").found == "1 of 71 changed: g2/07.jpg"


def test_a_photo_outside_the_sample_is_caught_when_every_photo_is_read(made, copy):
    photo = copy / "train/g2/07.jpg"
    data = bytearray(photo.read_bytes())
    data[-30] ^= 1
    photo.write_bytes(data)
    few = VerifySettings(made, copy, "python:tiny_teachers:grey", samples=8)
    assert verify(few).passed  # two photos of 71
    verdict = verify(dataclasses.replace(few, every_photo=True))
    assert check(verdict, "photos' CRC32").found == "1 of 71 changed: g2/07.jpg"
    assert verdict.measures["crops"] == 8


def test_a_photo_encoded_again_is_caught_wherever_it_is(made, copy):
    photo = copy / "train/g2/07.jpg"
    Image.open(photo).save(photo, quality=60)
    verdict = verify(VerifySettings(made, copy, "python:tiny_teachers:grey", samples=8))
    assert failed(verdict) == {"photos, names and sizes"}
    assert "--every-photo names it" in check(verdict, "photos, names and sizes").found


@pytest.mark.parametrize("gone", ["renamed", "removed", "folder"])
def test_photos_that_are_gone_are_named(made, copy, gone):
    photo = copy / "train/g2/07.jpg"
    if gone == "renamed":
        photo.rename(photo.with_name("new.jpg"))
    elif gone == "removed":
        photo.unlink()
    else:
        shutil.rmtree(photo.parent)
    verdict = verified(made, copy)
    assert failed(verdict) == {"photos, names and sizes", "photos' CRC32"}
    assert check(verdict, "photos, names and sizes").found.startswith(f"{9 if gone == 'folder' else 1} gone: g2/0")
    assert "g2/07.jpg" in check(verdict, "photos' CRC32").found or gone == "folder"


def test_new_photos_do_no_harm(made, copy):
    shutil.copy(copy / "train/g2/07.jpg", copy / "train/g2/99.jpg")
    verdict = verified(made, copy)
    assert verdict.passed
    assert check(verdict, "photos, names and sizes").found == "all 72 are there, 1 are not in the store; sizes unknown"


def test_photos_of_which_none_can_be_shown(made, copy):
    for photo in (copy / "train").glob("*/*.jpg"):
        photo.write_bytes(photo.read_bytes() + b"x")
    assert {"answers", "photos' CRC32"} <= failed(verified(made, copy))


# ---- The pixels


def _brighter(photo: Photo) -> Photo:
    """A decoder whose every fourth value is one level off."""
    values = photo.image.permute(1, 2, 0).flatten()
    values[::4] += (values[::4] < 255).to(torch.uint8)
    return Photo(values.reshape(*photo.image.shape[1:], 3).permute(2, 0, 1), photo.crc)


@pytest.mark.parametrize("layout", ["exact", "compact"])
def test_another_decoder_is_caught_by_its_pixels_and_by_its_name(photos, tmp_path, monkeypatch, layout):
    read = label_batches.read_photo
    monkeypatch.setattr(label_batches, "read_photo", lambda *photo, **how: _brighter(read(*photo, **how)))
    label(label_settings(photos, tmp_path / "store", layout=layout), lambda _: None)
    assert "records" in failed(verified(tmp_path / "store", photos))  # it says that it was ours
    monkeypatch.setattr(label_plan, "DECODER", {**ferkd.crops.DECODER, "name": "Quick"})
    label(label_settings(photos, tmp_path / "named", layout=layout), lambda _: None)
    verdict = verified(tmp_path / "named", photos)
    assert "decoder" in failed(verdict)
    assert check(verdict, "records").passed is None
    assert check(verdict, "decoder").wanted.startswith("Quick 1")


def test_another_version_of_the_decoder_is_left_to_the_answers(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(label_plan, "DECODER", {**ferkd.crops.DECODER, "version": "1.0"})
    label(label_settings(photos, tmp_path / "store"), lambda _: None)
    verdict = verified(tmp_path / "store", photos)
    assert verdict.passed
    assert check(verdict, "decoder").passed is None
    assert check(verdict, "records").passed is None


def test_another_resampler_is_caught(photos, tmp_path, monkeypatch):
    def coarse(image, box, flip, size, interpolation):
        return take_crop(take_crop(image, box, flip, size // 2, "bilinear"), (0, 0, size // 2, size // 2), False, size, "bilinear")

    monkeypatch.setattr(label_batches, "take_crop", coarse)
    label(label_settings(photos, tmp_path / "store"), lambda _: None)
    assert "records" in failed(verified(tmp_path / "store", photos))


def test_a_decoder_or_resampler_that_works_otherwise_here_is_caught(made, photos, monkeypatch):
    """Pillow's own pixels, in other words, are the measure of this machine's."""
    with monkeypatch.context() as patch:
        patch.setattr("ferkd.verify_sample.take_crop", lambda image, box, flip, size, _: take_crop(image, box, flip, size, "bicubic"))
        assert {"pixels, beside Pillow's", "records"} <= failed(verified(made, photos))
    decode = ferkd.crops.decode
    monkeypatch.setattr("ferkd.verify_sample.decode", lambda *a, **k: _brighter(Photo(decode(*a, **k), 0)).image)
    verdict = verified(made, photos)
    assert {"pixels, beside Pillow's", "records"} <= failed(verdict)
    assert verdict.measures["pixels_mean"] > 0.1


def test_sixteen_bit_photographs_are_verified_as_they_were_labelled(photos, tmp_path):
    """Pillow's own conversion makes them white."""
    data = tmp_path / "data"
    for i, level in enumerate(GREYS):
        (data / f"train/g{i}").mkdir(parents=True)
        for number in range(2):
            pixels = np.clip(257 * (level + np.random.default_rng(number).normal(0, 20, (40, 50))), 0, 65535).astype(np.uint16)
            Image.fromarray(pixels).save(data / f"train/g{i}/{number}.png")
    label(label_settings(data, tmp_path / "store"), lambda _: None)
    verdict = verified(tmp_path / "store", data)
    assert verdict.passed, verdict.reasons()


def test_sharp_photographs_pass_with_a_bicubic_teacher(tmp_path):
    """There single values are ten levels from Pillow's, and nearer to exact arithmetic as often as further from it."""
    data, random = tmp_path / "data", np.random.default_rng(0)
    for i, level in enumerate(GREYS):
        (data / f"train/g{i}").mkdir(parents=True)
        for number in range(3):
            edges = np.kron(random.integers(0, 2, (24, 24, 3)), np.ones((5, 5, 1))) * 255  # patches of full contrast
            Image.fromarray(np.clip(0.5 * edges + level - 64, 0, 255).astype(np.uint8)).save(data / f"train/g{i}/{number}.png")
    label(label_settings(data, tmp_path / "store", teacher="python:tiny_teachers:grey_bicubic", input_size=48), lambda _: None)
    verdict = verified(tmp_path / "store", data, "grey_bicubic")
    assert verdict.passed, verdict.reasons()
    assert verdict.measures["pixels_largest"] > 4
    assert verdict.measures["same_records"] == 1.0


def test_as_many_crops_are_looked_at_as_were_asked_for(photos, tmp_path):
    label(label_settings(photos, tmp_path / "store", crops=2), lambda _: None)
    verdict = verify(VerifySettings(tmp_path / "store", photos, "python:tiny_teachers:grey", samples=100))
    assert 98 <= verdict.measures["crops"] <= 100  # one photo has no labels


def test_with_other_threads_a_store_is_judged_by_its_answers(made, photos):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert check(verified(made, photos), "records").passed is None
    finally:
        torch.set_num_threads(before)


def test_a_photo_turned_by_exif_or_not_is_told(photos, tmp_path, monkeypatch):
    data = tmp_path / "data"
    for i in (0, 7):
        (data / f"train/g{i}").mkdir(parents=True)
        for number in range(12):
            ramp = np.linspace(0, 255, 40 * 64 * 3).reshape(40, 64, 3).astype(np.uint8)  # dark above, bright below
            exif = Image.Exif()
            exif[0x0112] = 3
            Image.fromarray(ramp).save(data / f"train/g{i}/{number}.png", exif=exif)
    for i in range(8):
        shutil.copytree(photos / f"train/g{i}", data / f"train/g{i}", dirs_exist_ok=True)
    shutil.rmtree(data / "train/g3")
    shutil.copytree(photos / "train/g4", data / "train/g3")
    read = label_batches.read_photo
    monkeypatch.setattr(label_batches, "read_photo", lambda photos, path, **_: read(photos, path, apply_exif=False))
    label(label_settings(data, tmp_path / "store"), lambda _: None)
    verdict = verified(tmp_path / "store", data)
    assert "KL, stored from new" in failed(verdict)
    assert verdict.cause is not None
    assert "EXIF orientation: not applied" in verdict.cause


# ---- Elsewhere


def test_on_another_machine_limits_count_instead_of_bits(made, photos, monkeypatch):
    monkeypatch.setattr(ferkd.devices, "device_name", lambda _: "another processor")
    verdict = verified(made, photos)
    assert verdict.passed
    assert check(verdict, "records").passed is None
    assert failed(verified(made, photos, "vague")) == {"KL, stored from new"}


def test_a_store_that_records_nothing_is_judged_by_its_answers(photos, tmp_path):
    """As one that was converted from other people's labels."""
    job = label_plan.plan_job(label_settings(photos, tmp_path / "store"))
    job = dataclasses.replace(job, plan=dataclasses.replace(job.plan, provenance={"decoder": {"apply_exif": True}}))
    with StoreWriter(tmp_path / "store", job.plan) as writer:
        for shard, first, last in writer.missing():
            writer.write_unit(shard, list(label_batches.label_images(job, [Task(shard, first, last)], lambda _: None)))
            writer.finish_shard(shard)
        writer.finish()
    verdict = verified(tmp_path / "store", photos)
    assert verdict.passed, verdict.reasons()
    assert check(verdict, "teacher's weights").passed is None
    assert check(verdict, "KL, stored from new").wanted == "mean at most 5.0e-02"


# ---- The files


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda store: _flip(store / "shards/shard-00001.bin"),
            r"shard-00001.bin: its SHA-256 is not what the manifest says \(1 images: g7/05.jpg",
        ),
        (lambda store: _flip(store / "index.bin"), "index.bin: its SHA-256 is not what the manifest says"),
        (lambda store: os.truncate(store / "shards/shard-00001.bin", 500), "shard-00001.bin: 500 bytes, the manifest says"),
        (lambda store: (store / "shards/shard-00000.bin").unlink(), "shard-00000.bin: is missing"),
        (lambda store: _edit(store / "manifest.json"), "manifest.json: was edited or damaged"),
    ],
)
def test_integrity_names_what_is_damaged(made, photos, tmp_path, damage, says):
    shutil.copytree(made, tmp_path / "store")
    assert verify(VerifySettings(tmp_path / "store", integrity=True)).passed
    damage(tmp_path / "store")
    verdict = verify(VerifySettings(tmp_path / "store", integrity=True))
    assert failed(verdict) == {"files"}
    assert re.search(says, verdict.checks[0].found), verdict.checks[0].found
    assert failed(verified(tmp_path / "store", photos))  # and a sample of it is not trusted either


def test_swapped_shards_are_found(tmp_path):
    store = make_store(tmp_path / "store", small_plan(128))
    first, second = (store.path / f"shards/shard-0000{i}.bin" for i in (0, 1))
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    found = verify(VerifySettings(store.path, integrity=True)).checks[0].found
    assert "shard-00000.bin" in found
    assert "shard-00001.bin" in found


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def _edit(file):
    file.write_text(file.read_text().replace('"crops": 8', '"crops": 9'))


# ---- Wrong use


def test_wrong_use_is_named(made, photos, tmp_path):
    with pytest.raises(InputError, match="give --data DIR and --teacher SPEC"):
        VerifySettings(made)
    with pytest.raises(InputError, match="--integrity checks the files' hashes alone"):
        VerifySettings(made, photos, integrity=True)
    with pytest.raises(InputError, match="samples: 0"):
        VerifySettings(made, photos, "timm:resnet18", samples=0)
    merged = make_store(tmp_path / "merged", small_plan(64, provenance={"merged_from": [{}, {}]}))
    with pytest.raises(InputError, match="is the average of 2 stores"):
        verify(VerifySettings(merged.path, photos, "python:tiny_teachers:grey"))
    assert verify(VerifySettings(merged.path, integrity=True)).passed
    with pytest.raises(StoreError, match="no such folder"):
        verify(VerifySettings(tmp_path / "none", integrity=True))
    with pytest.raises(InputError, match="nowhere: no such folder"):
        verify(VerifySettings(made, tmp_path / "nowhere", "python:tiny_teachers:grey"))
