"""What a store's size costs: opening it, its memory, random reads by one and two processes, a policy's first use.

    python bench/bench_scale.py                      1,281,167 images x 500 crops, then 70,000 classes: ${OUT:-bench/results}/scale.csv
    python bench/bench_scale.py --images 20000 --distinct 2 --seconds 1          a look

No 17.9 GB are needed. --distinct shards (default 60: 4.0 GB in --folder) hold labels of their own, made from a pool of random crops;
further shards are hard links to these in turn. Every row of the index is its image's own, with the CRC32 that a reader checks. What
differs from a store without links: the page cache need hold the distinct shards only. The table says which share of them lay there
(`cached`, by mincore); `dropped` is after posix_fadvise put them out of it, though a virtual machine's host may still have them.

Each figure is of a fresh process. Memory: `own` is what no file backs, `mapped` pages of files, here of the index: processes share
them and the kernel may take them back.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import dataclasses
import hashlib
import json
import mmap
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ferkd.crops import CropSettings, draw_crops
from ferkd.manifest import INDEX_HEADER, INDEX_MAGIC, VERSION, PathTable, Shard, sealed_json
from ferkd.records import BoxCodec, LabelCodec, pack_boxes, pack_labels
from ferkd.regions import RegionPolicy
from ferkd.shards import ROW, shard_file
from ferkd.store import LabelStore
from ferkd.store_writing import StorePlan, images_a_shard

OPENINGS = 5
K, M, WIDTH, HEIGHT, POOL = 5, 4, 500, 375, 1 << 16
LAYOUTS: dict[str, tuple[BoxCodec, LabelCodec]] = {"exact": ("stored", "half"), "compact": ("replayed", "packed")}
POLICIES = {"max": RegionPolicy(0.1, 0.5), "target": RegionPolicy(0.1, 0.5, confidence="target")}
PAPER_IMAGES = 14_197_122  # ImageNet-21k


@dataclasses.dataclass(frozen=True)
class Size:
    """A store to be measured; `distinct` shards have bytes of their own."""

    images: int
    crops: int
    classes: int
    layout: str
    distinct: int


# ---- Making the store ------------------------------------------------------------------------------------------------------------


def make_store(folder: Path, size: Size) -> int:
    """Writes the store; the bytes that its shards take on disk."""
    box_codec, label_codec = LAYOUTS[size.layout]
    names = [f"n{number:08d}" for number in range(size.classes)]
    paths = PathTable.from_paths(f"n{i % size.classes:08d}/n{i % size.classes:08d}_{i}.JPEG" for i in range(size.images))
    targets = np.array([int(paths.raw(i)[1:9]) for i in range(size.images)], np.uint32)
    plan = StorePlan(
        paths, targets, size.crops, K, names, {name: number for number, name in enumerate(names)}, box_codec, label_codec, CropSettings(),
        256, 1.0, {},
    )  # fmt: skip
    (folder / "shards").mkdir(parents=True)
    shards, crcs, on_disk = [], [], 0
    links: list[tuple[Path, str, np.ndarray]] = []  # file, SHA-256, CRC32 of every block
    random, pool = np.random.default_rng(0), _pool(size)
    for number in range(-(-size.images // plan.shard_images)):
        images = min(plan.shard_images, size.images - number * plan.shard_images)
        file = folder / shard_file(number)
        if number < size.distinct or images < plan.shard_images:
            made = (file, *_write_shard(file, images, pool, size.crops, random))
            links.append(made)
            on_disk += images * plan.image_bytes
        else:
            made = links[number % size.distinct]
            os.link(made[0], file)
        shards.append(dataclasses.asdict(Shard(shard_file(number), images, images * plan.image_bytes, made[1])))
        crcs.append(made[2])
    index = _write_index(folder / "index.bin", paths, targets, np.concatenate(crcs))
    content = {**plan.job(), "resumed_with": [], "shards": shards, "index": dataclasses.asdict(index), "failed": {}}
    (folder / "manifest.json").write_bytes(sealed_json(content))
    return on_disk


def _pool(size: Size) -> tuple[np.ndarray | None, np.ndarray]:
    """Boxes [POOL] uint64 (None if replayed) and labels [POOL, W] uint32 to choose crops from."""
    box_codec, label_codec = LAYOUTS[size.layout]
    random = np.random.default_rng(1)
    probs = -np.sort(-random.dirichlet(np.full(K + 1, 0.3), size=POOL)[:, :K].astype(np.float32), axis=1)
    words = pack_labels(random.integers(0, size.classes, (POOL, K)), probs, label_codec, size.classes)
    if box_codec == "replayed":
        return None, words
    return pack_boxes(*draw_crops(CropSettings(), 0, np.arange(POOL), WIDTH, HEIGHT)), words


def _write_shard(
    file: Path, images: int, pool: tuple[np.ndarray | None, np.ndarray], crops: int, random: np.random.Generator
) -> tuple[str, np.ndarray]:
    """A shard of crops chosen at random, and on disk when this returns: its SHA-256, and the CRC32 of every image's block [images]."""
    digest, crcs = hashlib.sha256(), np.empty(images, np.uint32)
    with open(file, "wb") as out:
        for first in range(0, images, 64):
            last = min(first + 64, images)
            chosen = random.integers(0, POOL, (last - first, crops))
            parts = [part[chosen].reshape(last - first, -1).view(np.uint8) for part in pool if part is not None]
            blocks = np.ascontiguousarray(np.concatenate(parts, axis=1))
            crcs[first:last] = [zlib.crc32(block.data) for block in blocks]
            digest.update(blocks.data)
            out.write(blocks.data)
        out.flush()
        os.fsync(out.fileno())  # or its pages could not be dropped
    return digest.hexdigest(), crcs


def _write_index(file: Path, paths: PathTable, targets: np.ndarray, crcs: np.ndarray) -> Shard:
    def chunks() -> Iterator[bytes]:
        yield INDEX_HEADER.pack(INDEX_MAGIC, VERSION, ROW.size, len(paths), int(paths.offsets[-1]))
        yield np.ascontiguousarray(paths.offsets, "<u8").tobytes()
        for first in range(0, len(paths), 1 << 14):
            rows = []
            for image in range(first, min(first + (1 << 14), len(paths))):
                row = ROW.pack(int(targets[image]), WIDTH, HEIGHT, image, 0)[:12]
                rows.append(row + zlib.crc32(row + paths.raw(image), int(crcs[image])).to_bytes(4, "little"))
            yield b"".join(rows)
        yield from paths.chunks()

    digest, size = hashlib.sha256(), 0
    with open(file, "wb") as out:
        for chunk in chunks():
            digest.update(chunk)
            size += out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return Shard("index.bin", len(paths), size, digest.hexdigest())


# ---- Measuring, in processes of their own ----------------------------------------------------------------------------------------


def memory() -> dict[str, float]:
    """MiB of this process: `own`, that no file backs; `mapped`, pages of files (libraries too)."""
    kib: dict[str, int] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, amount, *_ = line.split()
        kib[name.rstrip(":")] = int(amount)
    return {"own": kib["Anonymous"] / 1024, "mapped": (kib["Rss"] - kib["Anonymous"]) / 1024}


def peak() -> float:
    """MiB: the most that was resident since the process began."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def opening(folder: Path) -> dict[str, float]:
    before = memory()
    start = time.perf_counter()
    store = LabelStore(folder)
    seconds, after = time.perf_counter() - start, memory()
    found = {"open_ms": seconds * 1e3, "open_own_mib": after["own"] - before["own"], "open_mapped_mib": after["mapped"] - before["mapped"]}
    int(store.targets.max())
    return {**found, "targets_mapped_mib": memory()["mapped"] - after["mapped"]}


def first_use(folder: Path, confidence: str, most: int) -> dict[str, float]:
    """The scan over `most` images' crops, or all, and over what is kept of it."""
    import torch

    torch.set_num_threads(1)
    store, policy = LabelStore(folder), POLICIES[confidence]
    before, start = peak(), time.perf_counter()
    if most >= len(store):
        store.scan(policy)
        done = len(store)
    else:
        done = 0
        for images, values in store.confidences(policy.confidence):
            done += len(images)
            _regions(values, policy)
            if done >= most:
                break
    seconds, grown = time.perf_counter() - start, peak() - before
    found = {f"scan_{confidence}_s": seconds, f"scan_{confidence}_images": done, f"scan_{confidence}_grown_mib": grown}
    if done == len(store):
        start = time.perf_counter()
        store.scan(policy)
        found[f"scan_{confidence}_again_ms"] = (time.perf_counter() - start) * 1e3
    return found


def _regions(confidence: np.ndarray, policy: RegionPolicy) -> np.ndarray:
    import torch

    from ferkd.regions import region_of

    return region_of(torch.from_numpy(confidence), policy).numpy()


def reading(folder: Path, seed: int, seconds: float, start_together: Any) -> dict[str, float]:
    """Random visits for a while: what a step needs of them, labels and boxes of M crops."""
    store, random = LabelStore(folder), np.random.default_rng(seed)
    chosen = random.permutation(store.crops)[:M]
    before, visits = memory()["own"], 0
    start_together.wait()
    start = time.perf_counter()
    while (took := time.perf_counter() - start) < seconds:
        for image in random.integers(0, len(store), 50).tolist():
            labels = store.read(image)
            labels.label_words[chosen], labels.boxes(chosen)
        visits += 50
    return {"visits": visits, "s": took, "own_mib": memory()["own"] - before}


def share_cached(folder: Path) -> float:
    """Of the pages of the shards: those that lie in the page cache. Asking changes nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    cached = pages = 0
    for file in {os.stat(path).st_ino: path for path in (folder / "shards").iterdir()}.values():
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            resident = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
            if libc.mincore(view.ctypes.data, len(view), resident.ctypes.data):
                raise OSError(ctypes.get_errno(), "mincore")
            cached, pages = cached + int((resident & 1).sum()), pages + len(resident)
            del view  # or the mapping could not be closed
    return cached / pages


def drop_cached(folder: Path) -> None:
    """Asks the kernel to forget the store's pages."""
    for file in (folder / "index.bin", *(folder / "shards").iterdir()):
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _child(target: str, arguments: tuple[Any, ...], answer: Any) -> None:
    sys.stderr.flush()
    answered = globals()[target](*arguments)
    answer.send((answered, sum(os.times()[:2])))


spent = 0.0
"""Processor seconds of all of in_processes' so far: they are the forkserver's children, so that os.times() does not count them."""


def in_processes(target: str, *arguments: Any, count: int = 1) -> list[Any]:
    """target(...) in `count` fresh processes at once. Raises RuntimeError when one of them fails."""
    global spent
    forking = multiprocessing.get_context("forkserver")  # each forked from one that has imported, but opened nothing
    forking.set_forkserver_preload(["ferkd.store", "ferkd.regions", "torch"])
    together = forking.Barrier(count)
    running = []
    for number in range(count):
        mine, theirs = forking.Pipe(duplex=False)
        given = tuple(number if argument is SEED else together if argument is TOGETHER else argument for argument in arguments)
        process = forking.Process(target=_child, args=(target, given, theirs), daemon=True)
        process.start()
        theirs.close()
        running.append((process, mine))
    answers = []
    for process, mine in running:
        try:
            answered, seconds = mine.recv()
            answers.append(answered)
            spent += seconds
        except EOFError as error:
            process.join()
            raise RuntimeError(f"{target} ended with status {process.exitcode}") from error
        process.join()
    return answers


SEED, TOGETHER = "the process's number", "the barrier that all wait for"


def measure(folder: Path, size: Size, on_disk: int, seconds: float, scan_images: int, say: Any) -> dict[str, Any]:
    """All figures of a store, one row of the table."""
    from bench import machine

    manifest = json.loads((folder / "manifest.json").read_bytes())
    row: dict[str, Any] = {
        **dataclasses.asdict(size), "store_gb": sum(shard["bytes"] for shard in manifest["shards"]) / 1e9, "on_disk_gb": on_disk / 1e9,
        "shards": len(manifest["shards"]), "index_bytes_an_image": manifest["index"]["bytes"] / size.images,
        "manifest_kb": (folder / "manifest.json").stat().st_size / 1e3,
    }  # fmt: skip
    others, started = machine.seconds_of_others(), time.perf_counter()
    spent_before = spent

    drop_cached(folder)
    row["open_dropped_ms"] = in_processes("opening", folder)[0]["open_ms"]
    opened = [in_processes("opening", folder)[0] for _ in range(OPENINGS)]
    row |= {name: statistics.median(one[name] for one in opened) for name in opened[0]}
    say(f"opened in {row['open_ms']:.1f} ms ({row['open_dropped_ms']:.1f} with its pages dropped), {row['open_own_mib']:.1f} MiB its own")

    for confidence in POLICIES:
        row |= in_processes("first_use", folder, confidence, scan_images)[0]
        done, took = row[f"scan_{confidence}_images"], row[f"scan_{confidence}_s"]
        row[f"scan_{confidence}_ns_a_crop"] = took / done / size.crops * 1e9
        part = "all" if done == size.images else f"{done / size.images:.1%}, the first ones, of the"
        say(f"first use of a policy ({confidence}): {took:.1f} s for {part} {size.images:,} images, "
            f"{row[f'scan_{confidence}_ns_a_crop']:.1f} ns a crop")  # fmt: skip

    row["cached"] = share_cached(folder)
    for count in (1, 2):
        answers = in_processes("reading", folder, SEED, seconds, TOGETHER, count=count)
        row[f"visits_a_s_{count}"] = sum(one["visits"] / one["s"] for one in answers)
        row[f"reader_own_mib_{count}"] = max(one["own_mib"] for one in answers)
    say(f"random reads: {row['visits_a_s_1']:,.0f} images/s by one process, {row['visits_a_s_2']:,.0f} by two; {row['cached']:.0%} cached")
    drop_cached(folder)
    row["cached_after_drop"] = share_cached(folder)
    answers = in_processes("reading", folder, SEED, seconds, TOGETHER)
    row["visits_a_s_dropped"] = answers[0]["visits"] / answers[0]["s"]
    say(f"with its pages dropped ({row['cached_after_drop']:.0%} cached): {row['visits_a_s_dropped']:,.0f} images/s")

    busy = (machine.seconds_of_others() - others - (spent - spent_before)) / (time.perf_counter() - started)
    row["others_busy"] = max(busy, 0.0)
    return row


def on_paper(row: dict[str, Any]) -> list[str]:
    """What the measured store's figures make of PAPER_IMAGES: bytes by the format, times in proportion to crops."""
    image_bytes = round(row["store_gb"] * 1e9 / row["images"])
    shards = -(-PAPER_IMAGES // images_a_shard(image_bytes, PAPER_IMAGES))
    index = row["index_bytes_an_image"] * PAPER_IMAGES
    lines = [
        f"on paper, {PAPER_IMAGES:,} images x {row['crops']} crops, {row['layout']}, {PAPER_IMAGES / row['images']:.1f} times as many:",
        f"  {image_bytes * PAPER_IMAGES / 1e9:,.0f} GB in {shards:,} shards; index {index / 1e6:,.0f} MB, mapped and shared",
    ]
    for confidence in POLICIES:
        seconds = row[f"scan_{confidence}_ns_a_crop"] * row["crops"] * PAPER_IMAGES / 1e9
        lines.append(f"  first use of a policy ({confidence}): {seconds / 60:,.1f} min, one process, once")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--crops", type=int, default=500)
    parser.add_argument("--layout", choices=LAYOUTS, default="exact")
    parser.add_argument("--distinct", type=int, default=60, help="shards with bytes of their own, about 66 MB each")
    parser.add_argument("--classes", type=int, default=70_000, help="of the second store, of as many images x 20 crops")
    parser.add_argument("--seconds", type=float, default=10.0, help="of random reads, each time")
    parser.add_argument("--scan-images", type=int, default=1 << 62, help="scan only so many images and say so; default all")
    parser.add_argument(
        "--folder", type=Path, help="where the stores are made, and removed again; default the system's for temporary files"
    )
    options = parser.parse_args()
    for name in ("images", "crops", "distinct", "seconds", "scan_images"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')}: {getattr(options, name)}; give a number above 0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # so that the stores are removed
    sizes = [
        Size(options.images, options.crops, 1000, options.layout, options.distinct),
        *(Size(min(options.classes, options.images), 20, options.classes, layout, options.distinct) for layout in LAYOUTS),
    ]
    from bench import machine

    print(f"{machine.processor()}, Python {platform.python_version()}, numpy {np.__version__}; k={K}, {M} crops a visit")
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="ferkd-scale-") as name:
            folder = Path(name) / "store"
            needs, free = size.distinct * (67 << 20) + 60 * size.images, shutil.disk_usage(name).free
            if needs > free:
                parser.error(
                    f"{name}: up to {needs / 1e9:.1f} GB are needed and {free / 1e9:.1f} are free; give --folder, or fewer --distinct"
                )
            print(f"\n{size.images:,} images x {size.crops} crops, {size.classes:,} classes, {size.layout}", flush=True)
            on_disk = make_store(folder, size)
            row = measure(folder, size, on_disk, options.seconds, options.scan_images, lambda line: print(f"  {line}", flush=True))
            rows.append(row)
            print(f"  {row['store_gb']:.2f} GB ({row['on_disk_gb']:.2f} on disk) in {row['shards']} shards")
            print(
                f"  index {row['index_bytes_an_image']:.1f} bytes an image; other processes kept {row['others_busy']:.2f} processors busy"
            )
    print("\n" + "\n".join(on_paper(rows[0])))
    out = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "scale.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)), restval="")
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows)
    print(f"\nwrote {out / 'scale.csv'}")


if __name__ == "__main__":
    main()
