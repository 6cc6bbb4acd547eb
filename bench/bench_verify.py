"""How far apart right and wrong ways of asking a teacher lie, in the measures of `ferkd verify`: what its limits rest on.

    python bench/bench_verify.py                              writes ${OUT:-bench/results}/verify.csv

Labels FERKD_TEST_DATA/imagenette-mini-224 with EfficientNet-Lite0 (tests/lite0_teacher.py) and asks again about the crops: as it was,
with arithmetic of other machines, with other decoders and resamplers, other boxes, another normalisation.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ferkd.crops import decode, take_crop
from ferkd.labeling import LabelSettings, label
from ferkd.records import pack_labels
from ferkd.sources.folders import FolderPhotos
from ferkd.store import LabelStore
from ferkd.teacher import LoadedModel, answer_logits, load_teacher
from ferkd.verify_sample import SampledPhoto, divergence, read_sample

Cut = Callable[[SampledPhoto], Tensor]


def cuts(loaded: LoadedModel) -> dict[str, Cut]:
    """Ways from a photograph to its crops' pixels, uint8 [n, 3, S, S]."""
    size, own = loaded.preprocessing.input_size, loaded.preprocessing.interpolation
    other = "bilinear" if own == "bicubic" else "bicubic"
    noise = torch.Generator().manual_seed(0)

    def by(cut: Callable[[Tensor, list[int], bool], Tensor], decoder: Callable[[bytes], Tensor] = decode) -> Cut:
        def all_crops(photo: SampledPhoto) -> Tensor:
            image = decoder(photo.data)
            boxes, flips = photo.labels.boxes(photo.crops)
            return torch.stack([cut(image, box, flip) for box, flip in zip(boxes.tolist(), flips.tolist(), strict=True)])

        return all_crops

    def ours(image: Tensor, box: list[int], flip: bool) -> Tensor:
        return take_crop(image, box, flip, size, own)

    def in_float32(antialias: bool) -> Callable[[Tensor, list[int], bool], Tensor]:
        def cut(image: Tensor, box: list[int], flip: bool) -> Tensor:
            left, top, width, height = box
            part = image[None, :, top : top + height, left : left + width].float()
            crop = F.interpolate(part, size=(size, size), mode=own, antialias=antialias).round().clamp(0, 255).to(torch.uint8)[0]
            return crop.flip(-1) if flip else crop

        return cut

    def shifted(image: Tensor, box: list[int], flip: bool) -> Tensor:
        return ours(image, [min(box[0] + 1, image.shape[2] - box[2]), *box[1:]], flip)

    def encoded_again(data: bytes) -> Tensor:
        box = io.BytesIO()
        PIL.Image.open(io.BytesIO(data)).convert("RGB").save(box, "JPEG", quality=95)
        return decode(box.getvalue())

    def noisy(photo: SampledPhoto) -> Tensor:
        pixels = photo.cut(size, own, True)
        some = torch.rand(pixels.shape, generator=noise) < 0.02
        return (pixels + some * torch.randint(-1, 2, pixels.shape, generator=noise)).clamp(0, 255).to(torch.uint8)

    ways = {
        "Pillow's resampler": lambda photo: photo.cut_by_pillow(size, own, True),
        "resampler in float32": by(in_float32(True)),
        "resampler without antialias": by(in_float32(False)),
        f"{other} instead of {own}": lambda photo: photo.cut(size, other, True),
        "2 % of the values off by up to a level": noisy,
        "JPEG encoded again, quality 95": by(ours, encoded_again),
        "boxes a pixel to the right": by(shifted),
    }
    try:
        import simplejpeg
    except ImportError:
        return ways

    def fast(data: bytes) -> Tensor:
        return torch.from_numpy(simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True)).permute(2, 0, 1)

    return {**ways, "JPEG decoder, fast DCT and upsampling": by(ours, fast)}


class Double(nn.Module):
    """A network in float64."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.double())


def in_tf32(model: nn.Module) -> nn.Module:
    """A network whose products take factors of 10 bits, as TF32 does it on a GPU."""

    def rounded(x: Tensor) -> Tensor:
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.data = rounded(layer.weight.data)
            layer.register_forward_pre_hook(lambda _, arguments: (rounded(arguments[0]),))
    return model


def measure(
    store: LabelStore, photos: list[SampledPhoto], cut: Cut, loaded: LoadedModel, autocast: torch.dtype | None = None
) -> dict[str, float]:
    """What verify would measure."""
    kl, first, same = [], [], []
    for photo in photos:
        logits = answer_logits(loaded.model, loaded.preprocessing, cut(photo).contiguous(memory_format=torch.channels_last), autocast)
        ids, _ = store.unpack(photo.words)
        kl.append(divergence(store, photo.words, logits))
        first.append(logits.argmax(1).numpy() == ids[:, 0])
        new_probs, new_ids = torch.softmax(logits, 1).topk(store.k, dim=1)
        same.append((pack_labels(new_ids.numpy(), new_probs.numpy(), store.label_codec, store.classes) == photo.words).all(1))
    all_kl = np.concatenate(kl)
    return {
        "kl_mean": float(all_kl.mean()),
        "kl_largest": float(all_kl.max()),
        "first_answer": float(np.concatenate(first).mean()),
        "same_records": float(np.concatenate(same).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=64)
    parser.add_argument("--crops", type=int, default=16)
    options = parser.parse_args()
    sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))
    data, spec = Path(os.environ["FERKD_TEST_DATA"]) / "imagenette-mini-224", "python:lite0_teacher:make"
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for layout in ("exact", "compact"):
            out = Path(name) / layout
            label(LabelSettings(data, spec, out, options.crops, layout=layout, limit=options.photos, skip_preflight=True))  # type: ignore[arg-type]
            store, loaded = LabelStore(out), load_teacher(spec)
            own = loaded.preprocessing
            photos = list(read_sample(store, FolderPhotos(data / "train"), options.photos * options.crops, 0, False, [], lambda: None))

            def as_it_was(photo: SampledPhoto) -> Tensor:
                return photo.cut(224, own.interpolation, True)  # noqa: B023

            found = {"the same": measure(store, photos, as_it_was, loaded)}
            for way, network in (("network in float64", Double(loaded.model)), ("network in TF32, emulated", in_tf32(loaded.model))):
                found[way] = measure(store, photos, as_it_was, dataclasses.replace(loaded, model=network))
            found["network in bf16 (autocast)"] = measure(store, photos, as_it_was, loaded, torch.bfloat16)
            found |= {way: measure(store, photos, cut, loaded) for way, cut in cuts(loaded).items()}
            for way, mean, std in (
                ("normalisation 0.5, 0.5", (0.5,) * 3, (0.5,) * 3),
                ("ImageNet's normalisation", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
                ("no normalisation", (0.0,) * 3, (1.0,) * 3),
            ):
                other = dataclasses.replace(loaded, preprocessing=dataclasses.replace(own, mean=mean, std=std))
                found[way] = measure(store, photos, as_it_was, other)
            print(f"\n{layout:<40} {'mean KL':>9} {'largest':>9} {'first':>8} {'same':>8}")
            for way, m in found.items():
                print(f"{way:<40} {m['kl_mean']:>9.1e} {m['kl_largest']:>9.1e} {m['first_answer']:>8.1%} {m['same_records']:>8.1%}")
                rows.append({"layout": layout, "way": way, **{key: f"{value:.4g}" for key, value in m.items()}})
    target = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    target.mkdir(parents=True, exist_ok=True)
    with open(target / "verify.csv", "w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    print(f"\nwrote {target / 'verify.csv'}")


if __name__ == "__main__":
    main()
