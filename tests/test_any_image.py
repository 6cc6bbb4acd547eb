"""Whatever people keep in their folders of photographs: decoded as it looks, or refused by name; one bad file stops nothing."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from photos import write_photos
from safetensors.torch import load_file

from ferkd.crops import CropSettings, decode, draw_crops, take_crop
from ferkd.data import CropView, FreshCrops
from ferkd.errors import InputError
from ferkd.evaluation import evaluate_model
from ferkd.labeling import LabelSettings, label
from ferkd.photos import SplitPhotos
from ferkd.recipes import TrainConfig
from ferkd.sources import scan_split
from ferkd.stream import Visit
from ferkd.task import Job
from ferkd.teacher import load_run, load_teacher
from ferkd.train import train

CONFIG = TrainConfig(
    epochs=4.0, warmup_epochs=0.0, batch_size=12, crops_per_image=4, eval_every=2.0, log_every=2, workers=0, eval_crop_pct=1.0
)
RAMP = np.linspace(0, 255, 30 * 40).reshape(30, 40).astype(np.uint8)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)


def encoded(image: PIL.Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


picture, grey = PIL.Image.fromarray(COLOURS), PIL.Image.fromarray(RAMP)
KINDS = {
    "grey": (encoded(grey), RAMP, 0),
    "grey and alpha": (encoded(grey.convert("LA")), RAMP, 0),
    "alpha": (encoded(PIL.Image.fromarray(np.dstack([COLOURS, RAMP]))), COLOURS, 0),
    "palette": (encoded(grey.convert("P")), RAMP, 1),
    "CMYK JPEG": (encoded(picture.convert("CMYK"), "JPEG", quality=100, subsampling=0), COLOURS, 6),
    "16 bits PNG": (encoded(PIL.Image.fromarray(RAMP.astype(np.uint16) * 257)), RAMP, 0),
    "16 bits PGM": (encoded(PIL.Image.fromarray(RAMP.astype(np.int32) * 257), "PPM"), RAMP, 0),
    "16 bits TIFF": (encoded(PIL.Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF"), RAMP, 0),
    "moving GIF": (encoded(grey, "GIF", save_all=True, append_images=[PIL.Image.fromarray(255 - RAMP)]), RAMP, 0),
    "moving WebP": (encoded(picture, "WEBP", lossless=True, save_all=True, append_images=[PIL.Image.fromarray(255 - COLOURS)]), COLOURS, 0),
    "one pixel": (encoded(PIL.Image.new("RGB", (1, 1), (7, 8, 9))), np.full((1, 1, 3), (7, 8, 9)), 0),
    "very wide": (encoded(PIL.Image.new("RGB", (20_000, 3), (7, 8, 9))), np.full((3, 20_000, 3), (7, 8, 9)), 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_decoded_as_it_looks(kind: str) -> None:
    data, looks, tolerance = KINDS[kind]
    decoded = decode(data, name=kind)
    wanted = looks if looks.ndim == 3 else np.repeat(looks[..., None], 3, axis=2)
    assert decoded.shape == (3, *wanted.shape[:2])
    assert np.abs(decoded.permute(1, 2, 0).numpy().astype(int) - wanted).max() <= tolerance
    height, width = wanted.shape[:2]
    boxes, flips = draw_crops(CropSettings(), 0, np.arange(20), width, height)
    for box, flip in zip(boxes, flips, strict=True):
        assert take_crop(decoded, box, bool(flip), 16, "bilinear").shape == (3, 16, 16)


def test_an_upright_photo_is_upright() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 8
    decoded = decode(encoded(picture, "JPEG", exif=exif, quality=100))
    assert decoded.shape == (3, 40, 30)


def bomb() -> bytes:
    """A PNG whose header promises 32,000 x 32,000 pixels."""
    data = encoded(picture)
    header = b"IHDR" + (32_000).to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


BAD = {
    "empty": (b"", "0 bytes"),
    "text": (b"<html>not found</html>", "not an image that Pillow can decode"),
    "cut short": (encoded(picture, "JPEG")[:400], "cannot be decoded"),
    "32 bits": (encoded(PIL.Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "pixels of 32 bits"),
    "bomb": (bomb(), "decompression bomb"),
    "too wide": (encoded(PIL.Image.new("L", (32_768, 1))), "32768 x 1 pixels; sides up to 32,767"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_shown_is_refused_by_name(kind: str) -> None:
    data, says = BAD[kind]
    with pytest.raises(InputError, match=f"folder/photo.jpg: .*{says}"):
        decode(data, name="folder/photo.jpg")


# ------------------------------------------------------------------------------------------------- bad files among good ones


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs among which some in train and one in val cannot be read."""
    data = write_photos(tmp_path_factory.mktemp("spoilt") / "data")
    for number, (content, _) in enumerate(BAD.values()):
        (data / "train/green" / f"bad{number}.png").write_bytes(content)
    shutil.copy(data / "train/green/bad1.png", data / "val/red/bad.png")
    (data / "train/green/link.png").symlink_to(data / "train/green/0.png")
    return data


@pytest.mark.parametrize("cache", ["none", "decoded"])
def test_training_passes_over_what_cannot_be_read_and_names_it(spoilt: Path, tmp_path: Path, cache: Any) -> None:
    said: list[str] = []
    config = dataclasses.replace(CONFIG, cache=cache, epochs=8.0)
    summary = train(Job(spoilt, "python:photos:tiny_net", tmp_path / "run", config, say=said.append))
    assert len(summary["unreadable"]) == len(BAD)
    assert all(f"bad{number}.png" in line for number, line in enumerate(summary["unreadable"]))
    assert sum("another photograph takes its place" in line for line in said) == len(BAD)
    assert summary["val_images"] == 12
    evaluations = [json.loads(text) for text in (tmp_path / "run/log.jsonl").read_text().splitlines() if '"eval"' in text]
    assert all(line["unreadable"] == 1 for line in evaluations)
    accuracy = evaluate_model(load_run(tmp_path / "run"), spoilt, workers=0)
    assert (accuracy.images, accuracy.unreadable) == (12, 1)


def test_workers_and_the_cache_do_not_change_which_photograph_takes_the_place(spoilt: Path, tmp_path: Path) -> None:
    weights = []
    for name, changes in (("one", {}), ("two", {"workers": 2}), ("three", {"cache": "decoded"})):
        config = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
        train(Job(spoilt, "python:photos:tiny_net", tmp_path / name, config, say=lambda line: None))
        weights.append(load_file(tmp_path / name / "last.safetensors"))
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())


def test_labelling_goes_on_and_names_them(spoilt: Path, tmp_path: Path) -> None:
    said: list[str] = []
    settings = LabelSettings(spoilt, "python:photos:colour_teacher", tmp_path / "store", crops=4, topk=2, skip_preflight=True)
    store = label(settings, said.append)
    assert store is not None
    failed = [store.entry(image).path for image in range(len(store)) if store.entry(image).width == 0]
    assert failed == [f"green/bad{number}.png" for number in range(len(BAD))]
    assert all(any(path in line for line in said) for path in failed)
    summary = train(Job(spoilt, "python:photos:tiny_net", tmp_path / "run", CONFIG, store.path, say=lambda line: None))
    assert summary["usable_images"] == len(store) - len(BAD)


def test_a_folder_in_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    data = write_photos(tmp_path / "data")
    for photo in (data / "train").glob("*/*.png"):
        photo.write_bytes(b"x")
    with pytest.raises(InputError, match=r"24 photographs one after the other cannot be read, the first: .*not an image"):
        train(Job(data, "python:photos:tiny_net", tmp_path / "run", CONFIG, say=lambda line: None))
    for photo in (data / "val").glob("*/*.png"):
        photo.write_bytes(b"x")
    with pytest.raises(InputError, match="val: none of its 12 images can be read"):
        evaluate_model(load_teacher("python:photos:colour_teacher"), data, workers=0)


def test_a_fresh_crop_says_whose_place_it_takes(spoilt: Path) -> None:
    split = scan_split(spoilt, "train")
    first_bad = next(i for i in range(len(split)) if "bad" in split.paths[i])
    crops = FreshCrops(SplitPhotos(split), split.folder_of, CropSettings(), CropView(16))
    shown = crops[Visit(first_bad, 0, 2)]
    good = crops[Visit(first_bad + len(BAD), 0, 2)]
    assert len(shown.unreadable) == len(BAD)
    assert torch.equal(shown.pixels, good.pixels)
    assert shown.target == good.target
