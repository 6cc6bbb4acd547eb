"""Reading one image's labels at random, beside one torch.load an image as FKD stores them; and the bytes a crop takes.

    python bench/bench_store.py                      interleaves all variants, prints two tables, writes ${OUT:-bench/results}/store.csv
    python bench/bench_store.py --bytes              the table of bytes alone
    pytest bench/bench_store.py --benchmark-enable    the same variants under pytest-benchmark

200 crops an image, k = 5 of 1,000 classes, and what a step needs of them: boxes, flips and labels of m = 4 crops. A visit of FKD's
loader is torch.load of a file written by torch.save([coords, flip, labels]) and indexing; a visit of ours is LabelStore.read,
which checks the CRC32 of all 200 crops, the labels' words (the loss kernel takes them as they are) and boxes(4 crops). All files
lie in the page cache: this is the cost of reading itself, not of the disk.

Bytes are those of 500 crops an image: what a record holds, and what its files take for each crop, everything included. FKD's files are
those of `ferkd export fkd`, and the same tensors in float16, which our exporter does not write; ml-dr's hold what docs/formats.md
says. TinyViT's labels are of other augmentations and are counted by the format: a seed and k times an int16 id and a float16.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import machine
from ferkd.crops import CropSettings, draw_crops
from ferkd.interop.fkd_export import ExportSettings, export_fkd
from ferkd.records import BoxCodec, LabelCodec, crop_bytes, pack_boxes, pack_labels
from ferkd.store import LabelledImage, LabelStore, PathTable, StorePlan, StoreWriter

CROPS, K, CLASSES, M = 200, 5, 1000, 4
WIDTH, HEIGHT = 500, 375
LAYOUTS: dict[str, tuple[BoxCodec, LabelCodec]] = {"exact": ("stored", "half"), "compact": ("replayed", "packed")}


def answers(image: int, crops: int = CROPS) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One image's boxes, flips, ids and probabilities; what they are does not matter to the time."""
    rng = np.random.default_rng(image)
    boxes, flips = draw_crops(CropSettings(), image, np.arange(crops), WIDTH, HEIGHT)
    probs = -np.sort(-rng.dirichlet(np.full(K + 1, 0.3), size=crops)[:, :K].astype(np.float32), axis=1)
    return boxes, flips, rng.integers(0, CLASSES, (crops, K)), probs


def make_store(folder: Path, layout: str, images: int, crops: int = CROPS) -> LabelStore:
    """A store of `images` images in one of the two layouts."""
    box_codec, label_codec = LAYOUTS[layout]
    plan = StorePlan(
        PathTable.from_paths(f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(images)),
        np.arange(images) % CLASSES, crops, K, [str(i) for i in range(CLASSES)], {}, box_codec, label_codec, CropSettings(), 256, 1.0, {},
    )  # fmt: skip
    with StoreWriter(folder, plan) as writer:
        for shard, first, last in writer.missing():
            for start in range(first, last + 1, 64):
                unit = []
                for image in range(start, min(start + 64, last + 1)):
                    boxes, flips, ids, probs = answers(image, crops)
                    words = pack_boxes(boxes, flips) if box_codec == "stored" else None
                    unit.append(LabelledImage(WIDTH, HEIGHT, image, words, pack_labels(ids, probs, label_codec, CLASSES)))
                writer.write_unit(shard, unit)
            writer.finish_shard(shard)
        return writer.finish()


def make_fkd_files(folder: Path, images: int, half: bool) -> list[Path]:
    """One file an image as FKD's generator writes it (marginal_smoothing_k5): coords [M, 4], flip [M], labels [M, 2, k]."""
    folder.mkdir()
    dtype = torch.float16 if half else torch.float32
    files = []
    for image in range(images):
        boxes, flips, ids, probs = answers(image)
        coords = torch.from_numpy(boxes[:, [1, 0, 3, 2]] / np.array([HEIGHT, WIDTH, HEIGHT, WIDTH]))
        labels = torch.from_numpy(np.stack([ids, probs], axis=1))
        files.append(folder / f"{image}.tar")
        torch.save([coords.to(dtype), torch.from_numpy(flips), labels.to(dtype)], files[-1])
    return files


def visits(folder: Path, images: int) -> dict[str, Callable[[int], object]]:
    """Every variant as a function of (image number) that fetches boxes, flips and labels of M crops."""
    variants: dict[str, Callable[[int], object]] = {}
    chosen = np.random.default_rng(0).permutation(CROPS)[:M]
    index = torch.from_numpy(chosen)
    for half in (False, True):
        files = make_fkd_files(folder / f"fkd{half}", images, half)

        def load(image: int, files: list[Path] = files) -> object:
            coords, flips, labels = torch.load(files[image], weights_only=False)
            return coords[index], flips[index], labels[index]

        variants[f"FKD torch.load {'fp16' if half else 'fp32'}"] = load
    for layout in LAYOUTS:
        store = make_store(folder / layout, layout, images)

        def read(image: int, store: LabelStore = store) -> object:
            labels = store.read(image)
            return labels.label_words[chosen], labels.boxes(chosen)

        def words(image: int, store: LabelStore = store) -> object:
            return store.read(image).label_words[chosen]

        variants[f"ferkd {layout}"] = read
        variants[f"ferkd {layout}, labels only"] = words
    return variants


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[int], object]]:
    torch.set_num_threads(1)
    return visits(tmp_path_factory.mktemp("stores"), 128)


@pytest.mark.parametrize(
    "variant",
    [
        "FKD torch.load fp32",
        "FKD torch.load fp16",
        "ferkd exact",
        "ferkd exact, labels only",
        "ferkd compact",
        "ferkd compact, labels only",
    ],
)
def test_visit(benchmark: Any, small: Any, variant: str) -> None:
    order = np.random.default_rng(1).integers(0, 128, 64).tolist()
    benchmark(lambda: [small[variant](image) for image in order])


BYTES_CROPS, TINYVIT_K = 500, 100


def bytes_a_crop(folder: Path, images: int) -> list[tuple[str, int | None, float | None]]:
    """(format, bytes of a record, bytes a crop of its files with all they hold); None where not fixed, or not made."""
    rows: list[tuple[str, int | None, float | None]] = []
    for layout, codecs in LAYOUTS.items():
        store = make_store(folder / layout, layout, images, BYTES_CROPS)
        rows.append((f"ferkd {layout}", crop_bytes(*codecs, K, CLASSES), _on_disk(store.path, images)))
    export_fkd(ExportSettings(folder / "exact", folder / "fkd32"), lambda _: None)
    files = sorted((folder / "fkd32").rglob("*.tar"))
    (folder / "fkd16").mkdir()
    (folder / "mldr").mkdir()
    for number, file in enumerate(files):
        coords, flips, labels = torch.load(file, weights_only=True)
        torch.save([coords.half(), flips, labels.half()], folder / "fkd16" / f"{number}.tar")
        samples = [
            {"params": [(round(HEIGHT * box[0]), round(WIDTH * box[1]), round(HEIGHT * box[2]), round(WIDTH * box[3])), flip],
             "prob": (label[1], [int(one) for one in label[0]])}
            for box, flip, label in zip(coords.tolist(), flips.tolist(), labels.tolist(), strict=True)
        ]  # fmt: skip
        torch.save((number, samples), folder / "mldr" / f"{number}.pth.tar", pickle_protocol=4)
    for name, size, part in (("FKD float32", 4, "fkd32/train"), ("FKD float16", 2, "fkd16")):
        rows.append((name, 4 * size + 1 + 2 * K * size, _on_disk(folder / part, images)))
    rows.append(("ml-dr", None, _on_disk(folder / "mldr", images)))
    rows.append((f"TinyViT, k={TINYVIT_K}", 4 + 4 * TINYVIT_K, None))
    return rows


def _on_disk(folder: Path, images: int) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / images / BYTES_CROPS


def say_bytes(images: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        rows = bytes_a_crop(Path(name), images)
    print(f"{f'bytes a crop, {BYTES_CROPS} crops, k={K}':<30} {'record':>8} {'on disk, all':>14}")
    for kind, record, on_disk in rows:
        print(f"{kind:<30} {record or '':>8} {'' if on_disk is None else f'{on_disk:.1f}':>14}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=80, help="each times 50 visits of every variant, in changing order")
    parser.add_argument("--bytes", action="store_true", help="print the table of bytes alone")
    parser.add_argument("--bytes-images", type=int, default=256, help="images whose files that table measures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.bytes:
        say_bytes(options.bytes_images)
        return
    print(f"{machine.processor()}, Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}")
    print(f"{options.images:,} images x {CROPS} crops, k={K} of {CLASSES} classes, m={M} crops a visit, one process, warm page cache\n")
    rng = np.random.default_rng(2)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        variants = visits(folder, options.images)
        times: dict[str, list[float]] = {variant: [] for variant in variants}
        others, started = machine.seconds_of_others(), time.perf_counter()
        for number in range(options.rounds + 1):
            for variant in rng.permutation(list(variants)):
                order = rng.integers(0, options.images, 50).tolist()
                visit = variants[variant]
                start = time.perf_counter()
                for image in order:
                    visit(image)
                if number:  # the first round warms up
                    times[variant].append((time.perf_counter() - start) / len(order))
        busy = max((machine.seconds_of_others() - others) / (time.perf_counter() - started), 0.0)
        print(f"other processes kept {busy:.2f} processors busy\n")
        base = statistics.median(times["FKD torch.load fp32"])
        print(f"{'a visit':<30} {'us':>8} {'p20':>8} {'p80':>8} {'images/s':>10} {'x FKD':>7}")
        for variant, seconds in times.items():
            median, (p20, p80) = statistics.median(seconds), np.percentile(seconds, [20, 80])
            print(f"{variant:<30} {median * 1e6:>8.1f} {p20 * 1e6:>8.1f} {p80 * 1e6:>8.1f} {1 / median:>10,.0f} {base / median:>7.1f}")
            rows.append({
                "variant": variant, "us": f"{median * 1e6:.2f}", "p20_us": f"{p20 * 1e6:.2f}", "p80_us": f"{p80 * 1e6:.2f}",
                "images_per_s": f"{1 / median:.0f}", "times_fkd_fp32": f"{base / median:.2f}", "torch": torch.__version__,
                "others_busy": f"{busy:.2f}",
            })  # fmt: skip
    print()
    say_bytes(options.bytes_images)
    out = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "store.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"\nwrote {out / 'store.csv'}")


if __name__ == "__main__":
    main()
