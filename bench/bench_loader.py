"""The training loader beside an FKD-style one and beside decoding alone; decoders and resamplers by time and by pixels; workers; memory.

    python bench/bench_loader.py --data DIR       DIR/train/CLASS/*.jpg, default $FERKD_TEST_DATA/imagenet-fullres-100
                                                  prints the tables, writes ${OUT:-bench/results}/loader.csv
    python bench/bench_loader.py --memory 2000    only: resident memory over 2,000 batches of small made-up pictures

4 crops a photograph to 224 px from a store of made-up labels (200 crops, k = 5 of 1,000 classes), batches of 64 crops, files in the page
cache. The one-core tables pin the process to one core and count processor seconds, which other processes' turns on that core do not
lengthen; variants take turns, and ratios are medians of ratios within a turn. Workers are timed by the clock.

FKD's way is our own making after its description: decode once with Pillow, then for each crop cut, resize (bilinear), flip, ToTensor and
Normalize with torchvision. It reads no labels, ours does, which favours it by 0.26 ms a photograph (bench_store.py).
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.machine import processor, seconds_of_others, version
from ferkd.crops import CropSettings, decode, draw_crops, take_crop
from ferkd.data import CropView, StoredCrops, loaded, start_worker, training_loader
from ferkd.photos import DecodedPhotos, LabelledPhotos
from ferkd.process import keep_freed_memory
from ferkd.records import pack_boxes, pack_labels
from ferkd.regions import RegionPolicy
from ferkd.sources import read_photo, scan_split
from ferkd.sources.folders import FolderPhotos
from ferkd.store import LabelledImage, LabelStore, StorePlan, StoreWriter
from ferkd.stream import CropStream, Phase, StreamSampler, Visit

CROPS, K, CLASSES, M, SIZE, BATCH = 200, 5, 1000, 4, 224, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENDLESS = 1 << 30


def make_store(data: Path, out: Path) -> LabelStore:
    """A store over data/train with made-up answers; what they are does not matter to the time."""
    split = scan_split(data, "train")
    folders = {name: number % CLASSES for number, name in enumerate(split.folders)}
    names = [str(i) for i in range(CLASSES)]
    plan = StorePlan(split.paths, split.folder_of, CROPS, K, names, folders, "stored", "half", CropSettings(), 256, 1.0, {})
    rng = np.random.default_rng(0)
    with StoreWriter(out, plan) as writer:
        for shard, first, last in writer.missing():
            for start in range(first, last + 1, 64):
                unit = []
                for image in range(start, min(start + 64, last + 1)):
                    photo = read_photo(split.photos, split.paths[image])
                    height, width = photo.image.shape[1:]
                    boxes = pack_boxes(*draw_crops(plan.crop_settings, image, np.arange(CROPS), width, height))
                    probs = -np.sort(-rng.dirichlet(np.full(K + 1, 0.3), size=CROPS)[:, :K].astype(np.float32), axis=1)
                    labels = pack_labels(rng.integers(0, CLASSES, (CROPS, K)), probs, "half", CLASSES)
                    unit.append(LabelledImage(width, height, photo.crc, boxes, labels))
                writer.write_unit(shard, unit)
            writer.finish_shard(shard)
        return writer.finish()


# -------------------------------------------------------------------------------------------------------------------- the loaders


class FKDStyle(Dataset[tuple[Tensor, Tensor]]):
    """The visits of a StoredCrops as an FKD-style loader serves them: float32 [m, 3, S, S], normalised."""

    def __init__(self, root: Path, crops: StoredCrops) -> None:
        self.root, self.crops = root, crops
        self.boxes = []
        for image in crops.usable.tolist():
            labels = crops.store.read(image)
            self.boxes.append(labels.boxes(crops.walks([labels])[0]))

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, visit: Visit) -> tuple[Tensor, Tensor]:
        import torchvision.transforms.functional as functional

        entry = self.crops.store.entry(int(self.crops.usable[visit.image]))
        with open(self.root / entry.path, "rb") as file:
            photo = PIL.Image.open(file).convert("RGB")
        numbers = (visit.walk + np.arange(visit.crops)) % CROPS
        boxes, flips = self.boxes[visit.image]
        rows = []
        for (left, top, width, height), flip in zip(boxes[numbers].tolist(), flips[numbers].tolist(), strict=True):
            crop = functional.resized_crop(photo, top, left, height, width, [SIZE, SIZE], functional.InterpolationMode.BILINEAR)
            rows.append(functional.normalize(functional.to_tensor(functional.hflip(crop) if flip else crop), MEAN, STD))
        return torch.stack(rows), torch.full((visit.crops,), entry.target)


def flatten(visits: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([pixels for pixels, _ in visits]), torch.cat([target for _, target in visits])


class DecodedOnly(Dataset[int]):
    """Reads and decodes the photograph of a visit, by the function that the loader uses, and does nothing with it."""

    def __init__(self, photos: LabelledPhotos) -> None:
        self.photos = photos

    def __len__(self) -> int:
        return len(self.photos.store)

    def __getitem__(self, visit: Visit) -> int:
        return decode(self.photos.photos.read(self.photos.store.entry(visit.image).path)).shape[1]


class Loaders(NamedTuple):
    """The store and photographs that all loaders share, and the stream of visits that all of them serve."""

    root: Path
    store: LabelStore
    stream: CropStream

    def crops(self, cached: bool = False) -> StoredCrops:
        usable = np.flatnonzero(self.store.scan(RegionPolicy()).usable)
        files = LabelledPhotos(FolderPhotos(self.root), self.store)
        photos = DecodedPhotos(files, usable, threads=1) if cached else files
        return StoredCrops(photos, self.store, usable, RegionPolicy(), CropView(SIZE), seed=0)

    def ours(self, workers: int = 0, cached: bool = False, steps: int = ENDLESS) -> Iterator[Any]:
        return loaded(training_loader(self.crops(cached), StreamSampler(self.stream, 0, steps), workers, pin_memory=False))

    def fkd(self, workers: int = 0, steps: int = ENDLESS) -> Iterator[Any]:
        dataset = FKDStyle(self.root, self.crops())
        return iter(self._plain(dataset, flatten, workers, steps))

    def decoding(self, workers: int = 0, steps: int = ENDLESS) -> Iterator[Any]:
        return iter(self._plain(DecodedOnly(LabelledPhotos(FolderPhotos(self.root), self.store)), sum, workers, steps))

    def _plain(self, dataset: Dataset[Any], collate: Callable[[Any], Any], workers: int, steps: int) -> DataLoader[Any]:
        sampler = StreamSampler(self.stream, 0, steps)
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            worker_init_fn=start_worker,
        )


def make_loaders(data: Path, out: Path) -> Loaders:
    store = make_store(data, out)
    return Loaders(data / "train", store, CropStream(len(store), BATCH, [Phase(M, ENDLESS)], 0))


# ----------------------------------------------------------------------------------------------------------------- the one-core tables

Rows = list[dict[str, str]]


def in_turns(calls: dict[str, Callable[[], object]], seconds: float, block: int = 4) -> dict[str, np.ndarray]:
    """Processor seconds of a call, in blocks of the same call that take turns. A block's first call is not counted: it finds the
    caches, and the heap, as another kind left them.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    rng, end = np.random.default_rng(0), time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name in rng.permutation(list(calls)):
            calls[name]()
            start = time.process_time()
            for _ in range(1, block):
                calls[name]()
            times[name].append((time.process_time() - start) / (block - 1))
    return {name: np.array(found) for name, found in times.items()}


def table(part: str, times: dict[str, np.ndarray], photos: int, ratios: dict[str, str], more: dict[str, dict[str, str]]) -> Rows:
    """Rows of the CSV: milliseconds a photograph and, for each entry of `ratios`, that variant's time divided by the row's."""
    rows = []
    for name, found in times.items():
        ms = found / photos * 1e3
        p20, median, p80 = np.percentile(ms, [20, 50, 80])
        row = {"part": part, "variant": name, "ms_a_photo": f"{median:.3f}", "p20": f"{p20:.3f}", "p80": f"{p80:.3f}"}
        row |= {"crops_per_s": f"{M * 1e3 / median:.0f}", "turns": str(len(ms))}
        row |= {column: f"{statistics.median(times[base] / found):.2f}" for column, base in ratios.items()}
        rows.append(row | more.get(name, {}))
    return rows


def loader_rows(loaders: Loaders, seconds: float) -> Rows:
    iterators = {
        "FKD's way": loaders.fkd(),
        "ferkd": loaders.ours(),
        "decoding alone": loaders.decoding(),
        "ferkd --cache decoded": loaders.ours(cached=True),
    }
    calls: dict[str, Callable[[], object]] = {name: iterator.__next__ for name, iterator in iterators.items()}
    return table("loader", in_turns(calls, seconds), BATCH // M, {"x_fkd": "FKD's way", "of_decoding": "decoding alone"}, {})


def decoders() -> tuple[dict[str, Callable[[bytes], np.ndarray | Tensor]], dict[str, str]]:
    """Functions from a JPEG's bytes to uint8 [H, W, 3], and why the others are missing."""
    found: dict[str, Callable[[bytes], np.ndarray | Tensor]] = {
        "ferkd.crops.decode (Pillow, EXIF)": lambda data: decode(data).permute(1, 2, 0),
        "Pillow": lambda data: np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")),
    }
    missing = {}
    try:
        import simplejpeg

        found["simplejpeg"] = lambda data: simplejpeg.decode_jpeg(data)
        found["simplejpeg, fast DCT and upsampling"] = lambda data: simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True)
    except ImportError as error:
        missing["simplejpeg"] = str(error)
    for name in ("torchcodec.decoders", "torchvision.io"):
        try:
            module = __import__(name, fromlist=["x"])
            found[name] = lambda data, module=module: module.decode_jpeg(
                torch.frombuffer(data, dtype=torch.uint8), mode=module.ImageReadMode.RGB
            ).permute(1, 2, 0)
        except (ImportError, RuntimeError, OSError) as error:
            missing[name] = str(error).split("\n")[0]
    return found, missing


def difference(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> dict[str, str]:
    """Largest and mean difference of two lists of uint8 pictures in levels, and the share of values further apart than 1."""
    gaps = [np.abs(one.astype(np.int16) - other) for one, other in zip(found, wanted, strict=True)]
    values = sum(gap.size for gap in gaps)
    return {
        "largest": str(max(int(gap.max()) for gap in gaps)),
        "mean": f"{sum(float(gap.sum(dtype=np.int64)) for gap in gaps) / values:.4f}",
        "beyond_1": f"{sum(int((gap > 1).sum()) for gap in gaps) / values:.4%}",
    }


def decoder_rows(loaders: Loaders, seconds: float, photos: int) -> tuple[Rows, dict[str, str]]:
    store = loaders.store
    data = [(loaders.root / store.entry(image).path).read_bytes() for image in range(min(photos, len(store)))]
    found, missing = decoders()
    wanted = [np.asarray(found["Pillow"](one)) for one in data]
    more = {name: difference([np.asarray(run(one)) for one in data], wanted) for name, run in found.items()}
    calls = {name: (lambda run=run: [run(one) for one in data]) for name, run in found.items()}
    return table("decoder", in_turns(calls, seconds), len(data), {"x_pillow": "Pillow"}, more), missing


def resamplers() -> dict[str, Callable[[Tensor, PIL.Image.Image, tuple[int, int, int, int]], np.ndarray | Tensor]]:
    """Functions from a photograph (as tensor and as Pillow's picture) and a box to uint8 [S, S, 3]."""

    def interpolate(pixels: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", antialias=True)[0]

    def pillow(photo: Tensor, picture: PIL.Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
        left, top, width, height = box
        crop = picture.crop((left, top, left + width, top + height))
        return np.asarray(crop.resize((SIZE, SIZE), PIL.Image.Resampling.BILINEAR))

    def planes(photo: Tensor, picture: PIL.Image.Image, box: tuple[int, int, int, int]) -> Tensor:
        left, top, width, height = box
        return interpolate(photo[None, :, top : top + height, left : left + width]).permute(1, 2, 0)

    def as_float(photo: Tensor, picture: PIL.Image.Image, box: tuple[int, int, int, int]) -> Tensor:
        left, top, width, height = box
        resized = interpolate(photo[None, :, top : top + height, left : left + width].float())
        return resized.round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0)

    def ours(photo: Tensor, picture: PIL.Image.Image, box: tuple[int, int, int, int]) -> Tensor:
        return take_crop(photo, box, False, SIZE, "bilinear").permute(1, 2, 0)

    return {
        "ferkd.crops.take_crop": ours,
        "torch uint8, planes written": planes,
        "torch float32": as_float,
        "Pillow": pillow,
    }


def resampler_rows(loaders: Loaders, seconds: float, photos: int) -> Rows:
    store, work = loaders.store, []
    for image in range(min(photos, len(store))):
        photo = decode(loaders.root / store.entry(image).path)
        boxes, _ = draw_crops(CropSettings(), image, np.arange(M), photo.shape[2], photo.shape[1])
        work.append((photo, PIL.Image.fromarray(photo.permute(1, 2, 0).numpy()), [tuple(box) for box in boxes.tolist()]))
    found = resamplers()

    def crops(name: str) -> list[np.ndarray]:
        return [np.asarray(found[name](photo, picture, box)) for photo, picture, boxes in work for box in boxes]

    wanted = crops("Pillow")
    more = {name: difference(crops(name), wanted) for name in found}
    calls = {
        name: (lambda run=run: [run(photo, picture, box) for photo, picture, boxes in work for box in boxes]) for name, run in found.items()
    }
    return table("resampler", in_turns(calls, seconds), len(work), {"x_pillow": "Pillow"}, more)


# ------------------------------------------------------------------------------------------------------------------ workers and memory


def worker_rows(loaders: Loaders, steps: int, rounds: int) -> Rows:
    """Crops a second by the clock with 0, 1 and 2 workers, `steps` batches at a time after four that fill the queue."""
    ways: dict[str, Callable[[int, int], Iterator[Any]]] = {
        "FKD's way": lambda workers, steps: loaders.fkd(workers, steps=steps),
        "ferkd": lambda workers, steps: loaders.ours(workers, steps=steps),
        "ferkd --cache decoded": lambda workers, steps: loaders.ours(workers, cached=True, steps=steps),
    }
    rates: dict[tuple[str, int], list[float]] = {(name, workers): [] for name in ways for workers in (0, 1, 2)}
    for _ in range(rounds):
        for name, workers in rates:
            batches = ways[name](workers, 4 + steps)
            for _ in itertools.islice(batches, 4):
                pass
            start = time.perf_counter()
            count = sum(1 for _ in batches)
            rates[name, workers].append(count * BATCH / (time.perf_counter() - start))
    rows = []
    for (name, workers), found in rates.items():
        p20, median, p80 = np.percentile(found, [20, 50, 80])
        row = {"part": "workers", "variant": f"{name}, {workers} workers", "ms_a_photo": f"{M * 1e3 / median:.3f}", "turns": str(rounds)}
        row |= {"p20": f"{M * 1e3 / p80:.3f}", "p80": f"{M * 1e3 / p20:.3f}", "crops_per_s": f"{median:.0f}"}
        rows.append(row | {"x_no_worker": f"{median / statistics.median(rates[name, 0]):.2f}"})
    return rows


def resident_mib(pid: int) -> float:
    """Resident memory of a process that is not shared with others (/proc/PID/smaps_rollup, private clean and dirty)."""
    private = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_"):
            private += int(line.split()[1])
    return private / 1024


def memory(batches: int, workers: int, say: Callable[[str], None]) -> list[float]:
    """Private resident MiB of this process and its loaders' every tenth of `batches` batches of 64 crops of 200 small pictures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "data/train/noise"
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for number in range(200):
            PIL.Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
        store = make_store(folder.parents[1], Path(name) / "store")
        crops = StoredCrops(LabelledPhotos(FolderPhotos(folder.parent), store), store, np.arange(200), RegionPolicy(), CropView(32), seed=0)
        sampler = StreamSampler(CropStream(200, BATCH, [Phase(M, ENDLESS)], 0), 0, batches)
        found = []
        for number, _ in enumerate(loaded(training_loader(crops, sampler, workers, pin_memory=False)), 1):
            if number % max(1, batches // 10) == 0:
                children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
                found.append(resident_mib(os.getpid()))
                found_workers = [resident_mib(int(child)) for child in children]
                say(f"batch {number:>6,}: this process {found[-1]:7.1f} MiB, loaders " + ", ".join(f"{each:.1f}" for each in found_workers))
                found[-1] += sum(found_workers)
        return found


# -------------------------------------------------------------------------------------------------------------------------- all of it


def show(rows: Rows) -> None:
    columns = [column for column in dict.fromkeys(itertools.chain.from_iterable(rows)) if column not in ("part", "variant", "turns")]
    print(f"\n{rows[0]['part']:<38}" + "".join(f"{column:>13}" for column in columns))
    for row in rows:
        print(f"{row['variant']:<38}" + "".join(f"{row.get(column, ''):>13}" for column in columns))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(os.environ["FERKD_TEST_DATA"]) / "imagenet-fullres-100" if "FERKD_TEST_DATA" in os.environ else None
    parser.add_argument("--data", type=Path, default=default, help="a folder with train/CLASS/*.jpg")
    parser.add_argument("--seconds", type=float, default=40.0, help="for each of the one-core tables")
    parser.add_argument("--photos", type=int, default=40, help="how many the decoders and resamplers take")
    parser.add_argument("--steps", type=int, default=40, help="batches of each measurement with workers; 0 leaves those out")
    parser.add_argument("--rounds", type=int, default=5, help="measurements with workers")
    parser.add_argument("--memory", type=int, default=0, metavar="BATCHES", help="only watch resident memory")
    parser.add_argument("--workers", type=int, default=2, help="for --memory")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.memory:
        memory(options.memory, options.workers, print)
        return
    if options.data is None:
        parser.error("--data: give a folder of photographs, or set FERKD_TEST_DATA")
    warnings.filterwarnings("ignore", message="The given buffer is not writable")  # bytes are only read here
    packages = {name: version(name) for name in ("torch", "torchvision", "pillow", "simplejpeg", "torchcodec")}
    print(f"{processor()}, {os.cpu_count()} cores; " + ", ".join(f"{name} {found or 'absent'}" for name, found in packages.items()))
    keep_freed_memory()  # as training and labelling do on a CPU
    others, started, cores = seconds_of_others(), time.perf_counter(), os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as name:
        loaders = make_loaders(options.data, Path(name) / "store")
        os.sched_setaffinity(0, {max(cores)})
        tables = [loader_rows(loaders, options.seconds)]
        show(tables[-1])
        found, missing = decoder_rows(loaders, options.seconds / 2, options.photos)
        tables.append(found)
        show(tables[-1])
        for absent, reason in missing.items():
            print(f"{absent}: not measured: {reason}")
        tables.append(resampler_rows(loaders, options.seconds / 2, options.photos))
        show(tables[-1])
        os.sched_setaffinity(0, cores)
        if options.steps:
            tables.append(worker_rows(loaders, options.steps, options.rounds))
            show(tables[-1])
    busy = (seconds_of_others() - others) / (time.perf_counter() - started)
    print(f"\nother processes kept {busy:.2f} processors busy meanwhile (loader processes count as other ones)")
    out = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    out.mkdir(parents=True, exist_ok=True)
    rows = [row | packages | {"processor": processor()} for row in itertools.chain.from_iterable(tables)]
    with open(out / "loader.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(itertools.chain.from_iterable(rows))))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {out / 'loader.csv'}")


if __name__ == "__main__":
    main()
